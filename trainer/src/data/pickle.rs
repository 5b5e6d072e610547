//! Reads the Python pickles that CIFAR is distributed as, and runs nothing.
//!
//! A pickle is a program for a small stack machine, which may call any Python function. Here calls
//! are only written down: [`Value::Call`] keeps the function's name and its arguments, and the reader
//! of the data set takes the bytes out of what it knows to be an array. Instructions beyond those
//! that numbers, strings, lists, dictionaries and arrays need are an error that names them.

use std::rc::Rc;

/// Instructions a file may have: a batch of 10,000 images has some 60,000.
const MAX_STEPS: usize = 10_000_000;

/// What a pickle holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// Nothing, a number with a fraction: of no interest here.
    Other,
    /// A truth value.
    Truth(bool),
    /// A whole number.
    Int(i64),
    /// A string of any kind, as bytes.
    Bytes(Rc<[u8]>),
    /// A list or tuple.
    List(Vec<Value>),
    /// A dictionary, in the order it was written.
    Dict(Vec<(Value, Value)>),
    /// A function by module and name.
    Name(String),
    /// A call that was not made: the function, its arguments, the state set afterwards.
    Call(Box<Value>, Box<Value>, Option<Box<Value>>),
}

impl Value {
    /// The entry of a dictionary under a key of text.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        let Value::Dict(entries) = self else { return None };
        let wanted = |entry: &&(Value, Value)| matches!(&entry.0, Value::Bytes(found) if **found == *key.as_bytes());
        entries.iter().find(wanted).map(|(_, value)| value)
    }

    /// The numbers of a list of whole numbers.
    pub(super) fn ints(&self) -> Option<Vec<i64>> {
        let Value::List(items) = self else { return None };
        let int = |item: &Value| if let Value::Int(value) = item { Some(*value) } else { None };
        items.iter().map(int).collect()
    }

    /// The bytes of a numpy array of bytes, if they stand in C order.
    pub(super) fn array(&self) -> Option<Vec<u8>> {
        let Value::Call(function, arguments, state) = self else { return None };
        let (Value::Name(name), Value::List(arguments)) = (&**function, &**arguments) else {
            return None;
        };
        match state.as_deref() {
            // Up to protocol 4: an empty array, whose state is version, shape, type, order, bytes.
            Some(Value::List(state)) if name.ends_with("multiarray._reconstruct") => {
                match &state[..] {
                    [_, _, _, Value::Truth(false), bytes] => bytes.bytes(),
                    _ => None,
                }
            }
            // Protocol 5: a buffer, type, shape, order.
            None if name.ends_with("numeric._frombuffer") => match &arguments[..] {
                [bytes, _, _, Value::Bytes(order)] if **order == *b"C" => bytes.bytes(),
                _ => None,
            },
            _ => None,
        }
    }

    /// A string's bytes, also where Python 3 wrote them for Python 2: as text to be encoded.
    fn bytes(&self) -> Option<Vec<u8>> {
        match self {
            Value::Bytes(bytes) => Some(bytes.to_vec()),
            Value::Call(function, arguments, None) => match (&**function, &**arguments) {
                (Value::Name(name), Value::List(arguments)) if name == "_codecs.encode" => {
                    match &arguments[..] {
                        [Value::Bytes(text), Value::Bytes(code)] if **code == *b"latin1" => {
                            let text = std::str::from_utf8(text).ok()?;
                            text.chars().map(|letter| u8::try_from(letter).ok()).collect()
                        }
                        _ => None,
                    }
                }
                _ => None,
            },
            _ => None,
        }
    }
}

/// Reads a pickle of protocol 2 to 5: CIFAR's own are of protocol 2, by Python 2.
///
/// # Errors
/// What is wrong, and at which byte.
pub(super) fn read(bytes: &[u8]) -> Result<Value, String> {
    let mut machine =
        Machine { bytes, at: 0, stack: Vec::new(), marks: Vec::new(), memo: Vec::new() };
    for _ in 0..MAX_STEPS {
        let at = machine.at;
        if let Some(value) = machine.step().ok_or_else(|| machine.complain(at))? {
            return Ok(value);
        }
    }
    Err("pickle: too many instructions".to_owned())
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: Vec<Option<Value>>,
}

/// Values remembered at most; a number in the file chooses the place.
const MAX_MEMO: usize = 1 << 20;

impl<'a> Machine<'a> {
    fn complain(&self, at: usize) -> String {
        match self.bytes.get(at) {
            Some(byte) => {
                format!("pickle: instruction {byte:#04x} at byte {at} makes no sense here")
            }
            None => format!("pickle: ends at byte {at} without a result"),
        }
    }

    /// One instruction; the result if it was the last.
    fn step(&mut self) -> Option<Option<Value>> {
        let op = self.take(1)?[0];
        if op == b'.' {
            return self.stack.pop().map(Some);
        }
        let known = self.frame(op)?
            || self.number_of(op)?
            || self.text(op)?
            || self.container(op)?
            || self.call(op)?
            || self.memory(op)?;
        known.then_some(None)
    }

    // Each of these carries out the instructions of one kind: true if `op` was one, nothing if it was
    // and makes no sense here.

    /// What frames others: protocol, frame, mark.
    fn frame(&mut self, op: u8) -> Option<bool> {
        match op {
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            _ => return Some(false),
        }
        Some(true)
    }

    /// Numbers, truth values, nothing.
    fn number_of(&mut self, op: u8) -> Option<bool> {
        let value = match op {
            b'N' => Value::Other,
            0x88 => Value::Truth(true),
            0x89 => Value::Truth(false),
            b'G' => {
                self.take(8)?;
                Value::Other
            }
            b'I' => self.line()?.parse().map_or(Value::Other, Value::Int),
            b'L' => Value::Int(self.line()?.trim_end_matches('L').parse().ok()?),
            b'J' => Value::Int(i32::from_le_bytes(self.take(4)?.try_into().ok()?).into()),
            b'K' => Value::Int(self.number(1)? as i64),
            b'M' => Value::Int(self.number(2)? as i64),
            0x8a => {
                let count = self.number(1)?;
                let bytes = self.take(count)?;
                if bytes.len() > 8 {
                    return None;
                }
                let negative = bytes.last().is_some_and(|byte| *byte >= 0x80);
                let mut wide = [if negative { 0xff } else { 0 }; 8];
                wide[..bytes.len()].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(wide))
            }
            _ => return Some(false),
        };
        self.stack.push(value);
        Some(true)
    }

    /// Strings of text and of bytes, by the width of their length.
    fn text(&mut self, op: u8) -> Option<bool> {
        let width = match op {
            b'U' | b'C' | 0x8c => 1,
            b'T' | b'B' | b'X' => 4,
            0x8d | 0x8e | 0x96 => 8,
            _ => return Some(false),
        };
        let length = self.number(width)?;
        let bytes = self.take(length)?;
        self.stack.push(Value::Bytes(bytes.into()));
        Some(true)
    }

    /// Lists, tuples and dictionaries.
    fn container(&mut self, op: u8) -> Option<bool> {
        match op {
            b')' | b']' => self.stack.push(Value::List(Vec::new())),
            b'}' => self.stack.push(Value::Dict(Vec::new())),
            b't' | b'l' => {
                let items = self.since_mark()?;
                self.stack.push(Value::List(items));
            }
            0x85..=0x87 => {
                let count = usize::from(op - 0x84);
                let items = self.stack.split_off(self.stack.len().checked_sub(count)?);
                self.stack.push(Value::List(items));
            }
            b'a' => {
                let item = self.stack.pop()?;
                self.list()?.push(item);
            }
            b'e' => {
                let items = self.since_mark()?;
                self.list()?.extend(items);
            }
            b's' => {
                let (value, key) = (self.stack.pop()?, self.stack.pop()?);
                self.dict()?.push((key, value));
            }
            b'u' => {
                let mut items = self.since_mark()?.into_iter();
                let dict = self.dict()?;
                while let (Some(key), Some(value)) = (items.next(), items.next()) {
                    dict.push((key, value));
                }
            }
            _ => return Some(false),
        }
        Some(true)
    }

    /// Functions and their calls, which are written down.
    fn call(&mut self, op: u8) -> Option<bool> {
        match op {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Name(format!("{module}.{name}")));
            }
            0x93 => {
                let (name, module) = (self.stack.pop()?, self.stack.pop()?);
                let (Value::Bytes(name), Value::Bytes(module)) = (name, module) else {
                    return None;
                };
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                self.stack.push(Value::Name(format!("{}.{}", text(&module), text(&name))));
            }
            b'R' => {
                let (arguments, function) = (self.stack.pop()?, self.stack.pop()?);
                self.stack.push(Value::Call(Box::new(function), Box::new(arguments), None));
            }
            b'b' => {
                let state = self.stack.pop()?;
                let Some(Value::Call(_, _, slot)) = self.stack.last_mut() else { return None };
                *slot = Some(Box::new(state));
            }
            _ => return Some(false),
        }
        Some(true)
    }

    /// What is remembered and recalled: a place by its number, as text or of some width.
    fn memory(&mut self, op: u8) -> Option<bool> {
        let place = match op {
            0x94 => self.memo.len(),
            b'p' | b'g' => self.line()?.parse().ok()?,
            b'q' | b'h' => self.number(1)?,
            b'r' | b'j' => self.number(4)?,
            _ => return Some(false),
        };
        match op {
            b'g' | b'h' | b'j' => self.recall(place)?,
            _ => self.remember(place)?,
        }
        Some(true)
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(taken)
    }

    fn line(&mut self) -> Option<&'a str> {
        let length = self.bytes.get(self.at..)?.iter().position(|byte| *byte == b'\n')?;
        let line = self.take(length)?;
        self.take(1)?;
        std::str::from_utf8(line).ok()
    }

    fn number(&mut self, width: usize) -> Option<usize> {
        let bytes = self.take(width)?;
        let value = bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    }

    fn since_mark(&mut self) -> Option<Vec<Value>> {
        let mark = self.marks.pop()?;
        (mark <= self.stack.len()).then(|| self.stack.split_off(mark))
    }

    fn list(&mut self) -> Option<&mut Vec<Value>> {
        if let Some(Value::List(items)) = self.stack.last_mut() { Some(items) } else { None }
    }

    fn dict(&mut self) -> Option<&mut Vec<(Value, Value)>> {
        if let Some(Value::Dict(entries)) = self.stack.last_mut() { Some(entries) } else { None }
    }

    /// Only strings, names and empty things are recalled by the files this reads; whatever is large
    /// is shared or new, so that remembering does not copy.
    fn remember(&mut self, place: usize) -> Option<()> {
        if place >= MAX_MEMO {
            return None;
        }
        let value = match self.stack.last()? {
            value @ (Value::Bytes(_) | Value::Name(_) | Value::Int(_)) => Some(value.clone()),
            Value::List(items) if items.len() <= 3 => Some(Value::List(items.clone())),
            value @ Value::Call(_, _, None) => Some(value.clone()),
            _ => None,
        };
        if self.memo.len() <= place {
            self.memo.resize(place + 1, None);
        }
        self.memo[place] = value;
        Some(())
    }

    fn recall(&mut self, place: usize) -> Option<()> {
        let value = self.memo.get(place)?.clone()?;
        self.stack.push(value);
        Some(())
    }
}

#[cfg(test)]
mod tests {
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
            ("Python 2.7", include_bytes!("../../tests/data/python2_protocol2.pkl")),
            ("protocol 2", include_bytes!("../../tests/data/python3_protocol2.pkl")),
            ("protocol 3", include_bytes!("../../tests/data/python3_protocol3.pkl")),
            ("protocol 4", include_bytes!("../../tests/data/python3_protocol4.pkl")),
            ("protocol 5", include_bytes!("../../tests/data/python3_protocol5.pkl")),
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
            Box::new(Value::Name("os.system".to_owned())),
            Box::new(Value::List(vec![Value::Bytes(b"true"[..].into())])),
            None,
        );
        assert_eq!(read(hostile), Ok(expected));
        assert_eq!(read(hostile).unwrap().array(), None);
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
}
