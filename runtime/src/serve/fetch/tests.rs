//! Fetches from holders that give what they name, something else, or nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::questions::{queryable, reply};
use crate::transport::zenoh::{Link, Options};

const SPLIT: &str = "0123456789abcdef";
const RANK: usize = 1;

async fn link() -> Link {
    Link::open(&Options::default()).await.unwrap()
}

fn fetcher(link: &Link) -> Fetcher {
    Fetcher::new(link.session().clone(), SPLIT.to_owned(), 0)
}

/// A file of several chunks, more than are on their way at once.
fn file(seed: usize) -> Bytes {
    let bytes = (0..(IN_FLIGHT + 2) * CHUNK + 7).map(|at| ((at + seed) % 251) as u8);
    bytes.collect::<Vec<_>>().into()
}

fn head(file: &Bytes) -> Head {
    Head { digest: Digest::of(file), length: file.len() }
}

/// What is answered for a piece; nothing says nothing.
type Answers = Box<dyn Fn(Piece) -> Option<Bytes> + Send>;

/// Answers with the pieces of a file, as all of which `named` is named.
fn giving(named: Bytes, given: Bytes) -> Answers {
    let digest = Digest::of(&named);
    Box::new(move |piece| Some(chunk::answer(digest, &given, piece)))
}

/// A holder of that name; gives how many pieces it was asked for.
async fn holder(link: &Link, process: &str, answers: Answers) -> Arc<AtomicUsize> {
    let questions = queryable(link, &own_key(&shard_key(SPLIT, "*"), process)).await.unwrap();
    let key = own_key(&shard_key(SPLIT, &RANK.to_string()), process);
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok(query) = questions.recv_async().await {
            let piece = query.payload().and_then(Piece::read).unwrap();
            if piece != Piece::NOTHING {
                counted.fetch_add(1, Ordering::Relaxed);
            }
            let answer = answers(piece);
            if let Some(answer) = answer {
                reply(&query, key.clone(), answer).await;
            }
        }
    });
    count
}

async fn honest(link: &Link, process: &str, file: &Bytes) -> Arc<AtomicUsize> {
    holder(link, process, giving(file.clone(), file.clone())).await
}

/// What is fetched where every file is accepted.
async fn fetch(fetcher: &mut Fetcher, expected: Option<Digest>) -> Fetched {
    fetcher.fetch(RANK, expected, |_| Ok(())).await.unwrap()
}

fn asked(count: &AtomicUsize) -> usize {
    count.load(Ordering::Relaxed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_comes_whole_from_one_holder() {
    let (link, file) = (link().await, file(0));
    let mut fetcher = fetcher(&link);
    assert_eq!(fetch(&mut fetcher, None).await, Fetched::Nowhere);
    let (a, b) = (honest(&link, "a", &file).await, honest(&link, "b", &file).await);
    let digest = Digest::of(&file);
    assert_eq!(fetch(&mut fetcher, Some(digest)).await, Fetched::File(file));
    assert!(asked(&a) > IN_FLIGHT);
    assert_eq!(asked(&b), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_gives_garbage_is_left_for_the_next_and_not_asked_again() {
    let (link, file) = (link().await, file(0));
    // As long as the file that it names.
    let garbage = giving(file.clone(), vec![7_u8; file.len()].into());
    let a = holder(&link, "a", garbage).await;
    // What no answer looks like.
    let noise: Answers = {
        let (file, digest) = (file.clone(), Digest::of(&file));
        Box::new(move |piece| match piece == Piece::NOTHING {
            true => Some(chunk::answer(digest, &file, piece)),
            false => Some(Bytes::from_static(b"noise")),
        })
    };
    let b = holder(&link, "b", noise).await;
    honest(&link, "c", &file).await;
    let mut fetcher = fetcher(&link);
    assert_eq!(fetch(&mut fetcher, None).await, Fetched::File(file.clone()));
    let before = (asked(&a), asked(&b));
    assert!(before.0 > 0 && before.1 > 0, "{before:?}");
    assert_eq!(fetch(&mut fetcher, None).await, Fetched::File(file));
    // Pieces that the last fetch still had on their way to it may have come since.
    assert_eq!(asked(&a), before.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_of_two_files_make_none() {
    let (link, file, other) = (link().await, file(0), file(1));
    let mixed: Answers = {
        let (file, other) = (file.clone(), other.clone());
        let digests = (Digest::of(&file), Digest::of(&other));
        Box::new(move |piece| {
            Some(match piece.from < file.len() / 2 {
                true => chunk::answer(digests.0, &file, piece),
                false => chunk::answer(digests.1, &other, piece),
            })
        })
    };
    holder(&link, "a", mixed).await;
    let mut fetcher = fetcher(&link);
    assert_eq!(fetch(&mut fetcher, None).await, Fetched::Nowhere);
    assert!(fetcher.has_refused(RANK, "a"));
    // The same where the pieces are said to be of one file.
    let half = file.len() / 2;
    let spliced = Bytes::from([&file[..half], &other[half..]].concat());
    holder(&link, "b", giving(file.clone(), spliced)).await;
    assert_eq!(fetch(&mut fetcher, None).await, Fetched::Nowhere);
    honest(&link, "c", &file).await;
    assert_eq!(fetch(&mut fetcher, None).await, Fetched::File(file));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_file_is_known_holders_of_another_are_not_asked() {
    let (link, right, wrong) = (link().await, file(0), file(1));
    let expected = Some(Digest::of(&right));
    let (a, b) = (honest(&link, "a", &wrong).await, honest(&link, "b", &wrong).await);
    let mut fetcher = fetcher(&link);
    assert_eq!(fetch(&mut fetcher, expected).await, Fetched::Nowhere);
    honest(&link, "c", &right).await;
    assert_eq!(fetch(&mut fetcher, expected).await, Fetched::File(right));
    assert_eq!((asked(&a), asked(&b)), (0, 0));
    assert!(fetcher.told.contains(&RANK));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_it_is_not_known_what_most_name_is_asked_for() {
    let (link, one, two) = (link().await, file(0), file(1));
    honest(&link, "b", &two).await;
    honest(&link, "a", &one).await;
    // One each: the lowest name's.
    assert_eq!(fetch(&mut fetcher(&link), None).await, Fetched::File(one));
    honest(&link, "c", &two).await;
    let mut fetcher = fetcher(&link);
    assert_eq!(fetch(&mut fetcher, None).await, Fetched::File(two));
    assert!(fetcher.told.contains(&RANK));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_accepted_is_asked_for_elsewhere() {
    let (link, one, two) = (link().await, file(0), file(1));
    honest(&link, "a", &one).await;
    let mut fetcher = fetcher(&link);
    let accept = |file: Bytes| match file == two {
        true => Ok(()),
        false => Err(Refused::Split),
    };
    assert_eq!(fetcher.fetch(RANK, None, accept).await.unwrap(), Fetched::Nowhere);
    honest(&link, "b", &two).await;
    let fetched = fetcher.fetch(RANK, None, accept).await.unwrap();
    assert_eq!(fetched, Fetched::File(two.clone()));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_says_nothing_is_left_for_the_next_and_asked_again_later() {
    let (link, file) = (link().await, file(0));
    let silent: Answers = {
        let (file, digest) = (file.clone(), Digest::of(&file));
        Box::new(move |piece| {
            (piece == Piece::NOTHING).then(|| chunk::answer(digest, &file, piece))
        })
    };
    holder(&link, "a", silent).await;
    let mut fetcher = fetcher(&link);
    assert_eq!(fetch(&mut fetcher, None).await, Fetched::Later);
    honest(&link, "b", &file).await;
    assert_eq!(fetch(&mut fetcher, None).await, Fetched::File(file));
    assert!(!fetcher.has_refused(RANK, "a"));
}

#[test]
fn holders_are_in_the_order_in_which_they_are_asked() {
    let (one, two) = (head(&file(0)), head(&file(1)));
    let named = |holders: &[(&str, Head)]| {
        let holder = |&(process, head): &(&str, Head)| Holder { process: process.to_owned(), head };
        by_file(holders.iter().map(holder).collect())
    };
    let files = named(&[("c", one), ("a", two), ("b", one)]);
    assert_eq!(files[0], (one, vec!["b".to_owned(), "c".to_owned()]));
    let expected = format!("{} by b, c; {} by a", one.digest.short(), two.digest.short());
    assert_eq!(in_words(&files), expected);
    // A tie is the lowest name's, whichever file that is.
    assert_eq!(named(&[("a", one), ("b", two)])[0].0, one);
    assert_eq!(named(&[("a", two), ("b", one)])[0].0, two);
}

#[test]
fn a_name_is_of_one_process() {
    assert!(is_name("7f3a") && is_name(&"f".repeat(MAX_NAME)));
    let long = "f".repeat(MAX_NAME + 1);
    for other in ["", "*", "**", "a*", "a/b", "$*", &long] {
        assert!(!is_name(other), "{other}");
    }
}

#[test]
fn more_is_on_its_way_while_answers_come_briskly() {
    let mut pace = Pace::default();
    assert_eq!((pace.chunk(), pace.in_flight()), (LEAST, 1));
    for _ in 0..100 {
        pace.learn(pace.chunk(), BRISK / 2);
        assert!(pace.chunk() * pace.in_flight() <= IN_FLIGHT * CHUNK);
    }
    assert_eq!((pace.chunk(), pace.in_flight()), (CHUNK, IN_FLIGHT));
    for _ in 0..100 {
        pace.learn(pace.chunk(), BRISK);
    }
    assert_eq!((pace.chunk(), pace.in_flight()), (LEAST, 1));
}

#[test]
fn parts_make_a_file_in_any_order() {
    let parts = |order: &[usize]| {
        let mut parts = Parts::default();
        for &at in order {
            parts.put(at, Bytes::from(vec![at as u8; 2]));
        }
        parts.finish(Digest::of(&[0, 0, 2, 2, 4, 4]))
    };
    let whole = Bytes::from_static(&[0, 0, 2, 2, 4, 4]);
    assert_eq!(parts(&[4, 0, 2]), Ok(whole.clone()));
    assert_eq!(parts(&[0, 2, 4]), Ok(whole));
    assert!(matches!(parts(&[4, 2]), Err(Failure::Wrong(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_gave_something_else_the_first_are_forgotten() {
    let link = link().await;
    let mut fetcher = fetcher(&link);
    for number in 0..=MAX_REFUSED {
        fetcher.refuse(RANK, number.to_string(), "no reason");
    }
    assert_eq!(fetcher.refused.len(), MAX_REFUSED);
    assert!(!fetcher.has_refused(RANK, "0") && fetcher.has_refused(RANK, "1"));
    // Of another rank it may have the right one.
    assert!(!fetcher.has_refused(RANK + 1, "1"));
}
