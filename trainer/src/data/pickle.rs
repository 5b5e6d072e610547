//! Reads the Python pickles that CIFAR is distributed as, and runs nothing.
//!
//! A pickle is a program for a small stack machine, which may call any Python function. Here calls
//! are only written down: [`Value::Call`] keeps the function's name and its arguments, and the reader
//! of the data set takes the bytes out of what it knows to be an array. Instructions beyond those
//! that numbers, strings, lists, dictionaries and arrays need are an error that names them. What is
//! recalled is shared, never copied: a file takes memory in proportion to its length.

use std::rc::Rc;

/// Instructions a file may have: a batch of 10,000 images has some 60,000, CIFAR-100's 50,000 by any
/// Python some 500,000. Each may take a hundred bytes.
const MAX_STEPS: usize = 2_000_000;
/// How deep values may lie in one another: an array in a dictionary is six deep, and letting go of
/// a value takes some of the thread's stack for each level.
const MAX_DEPTH: usize = 64;
/// Longest name of a function and its module; those of arrays have some 40 letters.
const MAX_NAME: usize = 256;
/// Values remembered at most; a number in the file chooses the place.
const MAX_MEMO: usize = 1 << 20;
/// Items of a list that can be recalled, at most: it is copied when it grows afterwards.
const MAX_RECALLED: usize = 3;

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
    List(Rc<Vec<Value>>),
    /// A dictionary, in the order it was written.
    Dict(Rc<Vec<(Value, Value)>>),
    /// A function by module and name.
    Name(Rc<str>),
    /// A call that was not made: the function, its arguments, the state set afterwards.
    Call(Rc<Value>, Rc<Value>, Option<Rc<Value>>),
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
                (Value::Name(name), Value::List(arguments)) if **name == *"_codecs.encode" => {
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
    let mut machine = Machine {
        bytes,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
        refused: None,
    };
    for _ in 0..MAX_STEPS {
        let at = machine.at;
        if let Some(value) = machine.step().ok_or_else(|| machine.complain(at))? {
            return Ok(value);
        }
    }
    Err("pickle: too many instructions".to_owned())
}

/// A value, and how deep others lie in it: 0 where it holds none.
type Held = (Value, usize);

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Held>,
    marks: Vec<usize>,
    memo: Vec<Option<Held>>,
    /// What no file may have, where an instruction asked for it.
    refused: Option<&'static str>,
}

impl<'a> Machine<'a> {
    fn complain(&self, at: usize) -> String {
        match (self.refused, self.bytes.get(at)) {
            (Some(reason), _) => format!("pickle: at byte {at}: {reason}"),
            (None, Some(byte)) => {
                format!("pickle: instruction {byte:#04x} at byte {at} makes no sense here")
            }
            (None, None) => format!("pickle: ends at byte {at} without a result"),
        }
    }

    /// One instruction; the result if it was the last.
    fn step(&mut self) -> Option<Option<Value>> {
        let op = self.take(1)?[0];
        if op == b'.' {
            return self.stack.pop().map(|(value, _)| Some(value));
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
        self.push(value);
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
        self.push(Value::Bytes(bytes.into()));
        Some(true)
    }

    /// Lists, tuples and dictionaries.
    fn container(&mut self, op: u8) -> Option<bool> {
        match op {
            b')' | b']' => self.nest(Value::List(Rc::default()), 1)?,
            b'}' => self.nest(Value::Dict(Rc::default()), 1)?,
            b't' | b'l' => {
                let items = self.since_mark()?;
                self.gather(items)?;
            }
            0x85..=0x87 => {
                let items = self.last(usize::from(op - 0x84))?;
                self.gather(items)?;
            }
            b'a' => {
                let items = self.last(1)?;
                self.extend(items)?;
            }
            b'e' => {
                let items = self.since_mark()?;
                self.extend(items)?;
            }
            b's' => {
                let items = self.last(2)?;
                self.fill(items)?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.fill(items)?;
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
                self.name(module, name)?;
            }
            0x93 => {
                let held = self.last(2)?;
                let [(Value::Bytes(module), _), (Value::Bytes(name), _)] = &held[..] else {
                    return None;
                };
                self.name(std::str::from_utf8(module).ok()?, std::str::from_utf8(name).ok()?)?;
            }
            b'R' => {
                let held = self.last(2)?;
                let depth = holding(&held);
                let [(function, _), (arguments, _)] = <[Held; 2]>::try_from(held).ok()?;
                self.nest(Value::Call(Rc::new(function), Rc::new(arguments), None), depth)?;
            }
            b'b' => {
                let (state, inside) = self.stack.pop()?;
                let (Value::Call(function, arguments, _), depth) = self.stack.pop()? else {
                    return None;
                };
                let call = Value::Call(function, arguments, Some(Rc::new(state)));
                self.nest(call, depth.max(1 + inside))?;
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

    fn since_mark(&mut self) -> Option<Vec<Held>> {
        let mark = self.marks.pop()?;
        (mark <= self.stack.len()).then(|| self.stack.split_off(mark))
    }

    /// Takes the last so many values off the stack.
    fn last(&mut self, count: usize) -> Option<Vec<Held>> {
        Some(self.stack.split_off(self.stack.len().checked_sub(count)?))
    }

    /// Puts a value that holds no other on the stack.
    fn push(&mut self, value: Value) {
        self.stack.push((value, 0));
    }

    /// Puts a value that holds others, so many deep, on the stack.
    fn nest(&mut self, value: Value, depth: usize) -> Option<()> {
        if depth > MAX_DEPTH {
            self.refused = Some("values lie too deep in one another");
            return None;
        }
        self.stack.push((value, depth));
        Some(())
    }

    fn name(&mut self, module: &str, name: &str) -> Option<()> {
        if module.len() + name.len() > MAX_NAME {
            self.refused = Some("a function's name is too long");
            return None;
        }
        self.push(Value::Name(format!("{module}.{name}").into()));
        Some(())
    }

    /// Puts a list of `items` on the stack.
    fn gather(&mut self, items: Vec<Held>) -> Option<()> {
        let depth = holding(&items);
        let items = items.into_iter().map(|(value, _)| value).collect();
        self.nest(Value::List(Rc::new(items)), depth)
    }

    /// Appends to the list on the stack.
    fn extend(&mut self, items: Vec<Held>) -> Option<()> {
        let (Value::List(mut list), depth) = self.stack.pop()? else { return None };
        let depth = depth.max(holding(&items));
        Rc::make_mut(&mut list).extend(items.into_iter().map(|(value, _)| value));
        self.nest(Value::List(list), depth)
    }

    /// Adds keys and values, in turn, to the dictionary on the stack.
    fn fill(&mut self, items: Vec<Held>) -> Option<()> {
        let (Value::Dict(mut dict), depth) = self.stack.pop()? else { return None };
        let depth = depth.max(holding(&items));
        let mut items = items.into_iter().map(|(value, _)| value);
        let entries = Rc::make_mut(&mut dict);
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            entries.push((key, value));
        }
        self.nest(Value::Dict(dict), depth)
    }

    /// Only strings, names and small things are recalled by the files this reads.
    fn remember(&mut self, place: usize) -> Option<()> {
        if place >= MAX_MEMO {
            return None;
        }
        let held = self.stack.last()?;
        let kept = match &held.0 {
            Value::Bytes(_) | Value::Name(_) | Value::Int(_) | Value::Call(_, _, None) => true,
            Value::List(items) => items.len() <= MAX_RECALLED,
            _ => false,
        };
        let value = kept.then(|| held.clone());
        if self.memo.len() <= place {
            self.memo.resize(place + 1, None);
        }
        self.memo[place] = value;
        Some(())
    }

    fn recall(&mut self, place: usize) -> Option<()> {
        let held = self.memo.get(place)?.clone()?;
        self.stack.push(held);
        Some(())
    }
}

/// How deep values lie in one that holds these.
fn holding(held: &[Held]) -> usize {
    1 + held.iter().map(|(_, depth)| *depth).max().unwrap_or(0)
}

#[cfg(test)]
mod tests;
