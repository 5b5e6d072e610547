//! Pickles as Pythons write them, and as nobody should.

use super::*;

/// What Python 2 wrote for {'labels': [6, 300], 'data': array([[1, 2]], uint8)}, protocol 2.
const PYTHON_2: &[u8] = b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(K\x06M\x2c\x01eU\x04dataq\x04\
    cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85q\x07U\x01b\x87Rq\x08\
    (K\x01K\x01K\x02\x86cnumpy\ndtype\nq\x09U\x02u1K\x00K\x01\x87Rq\x0a(K\x03U\x01|NNNJ\xff\xff\xff\xff\
    J\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x02tbu.";

#[test]
fn an_array_and_a_list_are_read() {
    let value = read(PYTHON_2).unwrap();
    assert_eq!(value.get("labels").unwrap().ints(), Some(vec![6, 300]));
    assert_eq!(value.get("data").unwrap().array(), Some(vec![1, 2]));
    assert_eq!(value.get("filenames"), None);
}

/// Written by `tests/data/pickles.py`: two images, counted through, and their labels.
#[test]
fn what_pythons_write_is_read() {
    let files: [(&str, &[u8]); 5] = [
        ("Python 2.7", include_bytes!("../../../tests/data/python2_protocol2.pkl")),
        ("protocol 2", include_bytes!("../../../tests/data/python3_protocol2.pkl")),
        ("protocol 3", include_bytes!("../../../tests/data/python3_protocol3.pkl")),
        ("protocol 4", include_bytes!("../../../tests/data/python3_protocol4.pkl")),
        ("protocol 5", include_bytes!("../../../tests/data/python3_protocol5.pkl")),
    ];
    let pixels: Vec<u8> = (0..2 * 3072_u32).map(|at| (at * 7 % 256) as u8).collect();
    for (name, bytes) in files {
        let value = read(bytes).unwrap();
        assert_eq!(value.get("labels").unwrap().ints(), Some(vec![6, 9]), "{name}");
        assert!(value.get("data").unwrap().array().as_deref() == Some(&pixels), "{name}");
        // The same array, its columns first.
        assert_eq!(value.get("columns").unwrap().array(), None, "{name}");
    }
}

#[test]
fn a_call_is_written_down_and_never_made() {
    let hostile = b"cos\nsystem\n(S'true'\ntR.";
    assert!(read(hostile).unwrap_err().contains("instruction 0x53 at byte 12"));
    let hostile = b"cos\nsystem\n(U\x04truetR.";
    let expected = Value::Call(
        Rc::new(Value::Name("os.system".into())),
        Rc::new(Value::List(Rc::new(vec![Value::Bytes(b"true"[..].into())]))),
        None,
    );
    assert_eq!(read(hostile), Ok(expected));
    assert_eq!(read(hostile).unwrap().array(), None);
}

/// Copied, the values of the last round would be 3^50.
#[test]
fn what_is_recalled_again_and_again_is_shared() {
    let mut bytes = b"\x80\x02K\x01q\x00".to_vec();
    bytes.extend(b"h\x00h\x00h\x00\x87q\x00".repeat(50));
    bytes.push(b'.');
    let value = read(&bytes).unwrap();
    assert!(matches!(value, Value::List(items) if items.len() == 3));
    // A list that grows after it was remembered is remembered as it was.
    let value = read(b"]q\x00K\x01ah\x00\x86.").unwrap();
    let lists = [vec![Value::Int(1)], vec![]].map(|items| Value::List(Rc::new(items)));
    assert_eq!(value, Value::List(Rc::new(lists.to_vec())));
}

#[test]
fn values_that_lie_too_deep_in_one_another_are_refused() {
    let deep = |first: &[u8], wrap: &[u8], last: &[u8], times: usize| {
        read(&[first, &wrap.repeat(times)[..], &last.repeat(times)[..], b"."].concat())
    };
    let ways: [(&[u8], &[u8], &[u8]); 6] = [
        (b"N", b"\x85", b""),
        (b"N", b"NR", b""),
        (b"N", b"(", b"t"),
        (b"]", b"]", b"a"),
        (b"}", b"N}", b"s"),
        (b"NNR", b"NNR", b"b"),
    ];
    for (first, wrap, last) in ways {
        assert!(deep(first, wrap, last, 50).is_ok(), "{wrap:?}");
        // Without a limit they overflow the thread's stack when they are let go of.
        let error = deep(first, wrap, last, 400_000).unwrap_err();
        assert!(error.ends_with("values lie too deep in one another"), "{wrap:?}: {error}");
    }
}

#[test]
fn a_name_without_end_is_refused() {
    let long = [&b"c"[..], &[b'a'; 300], b"\nb\n."].concat();
    let expected = "pickle: at byte 0: a function's name is too long".to_owned();
    assert_eq!(read(&long), Err(expected));
}

#[test]
fn cut_and_altered_files_give_an_error_or_a_value() {
    for end in 0..PYTHON_2.len() {
        assert!(read(&PYTHON_2[..end]).is_err(), "cut at {end}");
        for byte in [0, b'.', b'R', b'b', b'u', b'q', 0xff] {
            let mut altered = PYTHON_2.to_vec();
            altered[end] = byte;
            let _ = read(&altered);
        }
    }
}
