//! The part of Python's pickle format that model checkpoints use, read into plain data.
//!
//! Nothing is imported, called or executed: classes are names, calls are a name beside its arguments. Objects sit in
//! one arena and refer to each other by position, so shared and even cyclic objects cost nothing to copy or drop.
//! Operations outside the list below are refused, and every count has a limit.

use std::collections::HashMap;

use crate::error::TfmError;

/// Position of an object in its arena.
pub(crate) type Id = usize;

/// One object.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Object {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    /// `module.name`.
    Class(String),
    /// Tuple or list.
    Sequence(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// What a call of `callable` with `arguments` would have made.
    Call {
        callable: Id,
        arguments: Id,
    },
    /// Data outside the pickle.
    Persistent(Id),
}

/// A read pickle.
#[derive(Debug)]
pub(crate) struct Pickle {
    objects: Vec<Object>,
    root: Id,
}

impl Pickle {
    /// Reads one pickle up to its stop mark.
    ///
    /// # Errors
    /// [`TfmError::TooLarge`] beyond [`MAX_PICKLE_BYTES`] or [`MAX_OBJECTS`]; [`TfmError::Format`] for anything that
    /// isn't a complete pickle of the accepted operations.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, TfmError> {
        if bytes.len() > MAX_PICKLE_BYTES {
            let (got, limit) = (bytes.len(), MAX_PICKLE_BYTES);
            return Err(TfmError::TooLarge { what: "pickle", got, limit });
        }
        let mut machine = Machine {
            rest: bytes,
            objects: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        while machine.step()? {}
        let root = machine.pop()?;
        Ok(Self { objects: machine.objects, root })
    }

    /// The outermost object.
    pub(crate) fn root(&self) -> Id {
        self.root
    }

    /// An object; `None` only for a position of another arena.
    pub(crate) fn get(&self, id: Id) -> Option<&Object> {
        self.objects.get(id)
    }

    /// Text, if the object is one.
    pub(crate) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Some(Object::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A count, if the object is one.
    pub(crate) fn count(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Some(Object::Int(value)) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Members of a tuple or list.
    pub(crate) fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Some(Object::Sequence(members)) => Some(members),
            _ => None,
        }
    }

    /// Entries of a dictionary.
    pub(crate) fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Some(Object::Dict(entries)) => Some(entries),
            _ => None,
        }
    }

    /// The value under a text key of a dictionary; the last one if the key occurs twice.
    pub(crate) fn entry(&self, id: Id, key: &str) -> Option<Id> {
        let entries = self.dict(id)?;
        entries.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|(_, value)| *value)
    }

    /// Name and arguments of a call.
    pub(crate) fn call(&self, id: Id) -> Option<(&str, &[Id])> {
        let Some(Object::Call { callable, arguments }) = self.get(id) else { return None };
        match self.get(*callable) {
            Some(Object::Class(name)) => Some((name, self.sequence(*arguments)?)),
            _ => None,
        }
    }
}

struct Machine<'a> {
    rest: &'a [u8],
    objects: Vec<Object>,
    stack: Vec<Id>,
    /// Stack heights at open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// Runs one operation; `false` at the stop mark.
    fn step(&mut self) -> Result<bool, TfmError> {
        match self.byte()? {
            b'.' => return Ok(false),
            0x80 => drop(self.byte()?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Object::None)?,
            0x88 => self.push(Object::Bool(true))?,
            0x89 => self.push(Object::Bool(false))?,
            b'K' => {
                let value = self.byte()?;
                self.push(Object::Int(value.into()))?;
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Object::Int(value.into()))?;
            }
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Object::Int(value.into()))?;
            }
            0x8a => self.long()?,
            b'G' => {
                let value = f64::from_be_bytes(self.array()?);
                self.push(Object::Float(value))?;
            }
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                self.text(length as usize)?;
            }
            0x8c => {
                let length = self.byte()?;
                self.text(length.into())?;
            }
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.push(Object::Class(format!("{module}.{name}")))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Some(Object::Text(name)), Some(Object::Text(module))) =
                    (self.objects.get(name), self.objects.get(module))
                else {
                    return Err(refused("a class name is not a text"));
                };
                let class = Object::Class(format!("{module}.{name}"));
                self.push(class)?;
            }
            b')' | b']' => self.push(Object::Sequence(Vec::new()))?,
            b't' => {
                let members = self.marked()?;
                self.push(Object::Sequence(members))?;
            }
            code @ 0x85..=0x87 => {
                let count = usize::from(code - 0x84);
                let from =
                    self.stack.len().checked_sub(count).ok_or_else(|| refused("the stack is empty"))?;
                let members = self.stack.split_off(from);
                self.push(Object::Sequence(members))?;
            }
            b'}' => self.push(Object::Dict(Vec::new()))?,
            b'a' => {
                let member = self.pop()?;
                self.extend(vec![member])?;
            }
            b'e' => {
                let members = self.marked()?;
                self.extend(members)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(&[key, value])?;
            }
            b'u' => {
                let entries = self.marked()?;
                self.insert(&entries)?;
            }
            b'q' => {
                let key = self.byte()?;
                self.remember(key.into())?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.array()?);
                self.remember(key)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let key = self.byte()?;
                self.recall(key.into())?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array()?);
                self.recall(key)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Object::Persistent(id))?;
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                let dict = matches!(
                    self.objects.get(callable),
                    Some(Object::Class(name)) if name == "collections.OrderedDict"
                );
                self.push(if dict {
                    Object::Dict(Vec::new())
                } else {
                    Object::Call { callable, arguments }
                })?;
            }
            // The state of an object (for an ordered dictionary: its attributes) is not needed.
            b'b' => drop(self.pop()?),
            other => return Err(refused(format!("operation 0x{other:02x} is not accepted"))),
        }
        Ok(true)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], TfmError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(|| refused("it ends early"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], TfmError> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| refused("it ends early"))
    }

    fn byte(&mut self) -> Result<u8, TfmError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn line(&mut self) -> Result<&'a str, TfmError> {
        let end = self.rest.iter().position(|b| *b == b'\n').ok_or_else(|| refused("it ends early"))?;
        let line = self.take(end)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(refused)
    }

    fn text(&mut self, length: usize) -> Result<(), TfmError> {
        let text = std::str::from_utf8(self.take(length)?).map_err(refused)?;
        self.push(Object::Text(text.to_owned()))
    }

    /// A little-endian signed integer of up to eight bytes.
    fn long(&mut self) -> Result<(), TfmError> {
        let length = self.byte()?;
        let bytes = self.take(length.into())?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        let kept = wide.get_mut(..bytes.len()).ok_or_else(|| refused("an integer is longer than 8 bytes"))?;
        kept.copy_from_slice(bytes);
        self.push(Object::Int(i64::from_le_bytes(wide)))
    }

    fn push(&mut self, object: Object) -> Result<(), TfmError> {
        if self.objects.len() >= MAX_OBJECTS {
            let (got, limit) = (MAX_OBJECTS + 1, MAX_OBJECTS);
            return Err(TfmError::TooLarge { what: "number of pickled objects", got, limit });
        }
        self.stack.push(self.objects.len());
        self.objects.push(object);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, TfmError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(refused("the stack is empty"));
        }
        self.stack.pop().ok_or_else(|| refused("the stack is empty"))
    }

    fn top(&mut self) -> Result<&mut Object, TfmError> {
        let id = self.stack.last().copied().ok_or_else(|| refused("the stack is empty"))?;
        self.objects.get_mut(id).ok_or_else(|| refused("the stack is empty"))
    }

    fn marked(&mut self) -> Result<Vec<Id>, TfmError> {
        let mark = self.marks.pop().ok_or_else(|| refused("a mark is missing"))?;
        if mark > self.stack.len() {
            return Err(refused("a mark is missing"));
        }
        Ok(self.stack.split_off(mark))
    }

    fn extend(&mut self, members: Vec<Id>) -> Result<(), TfmError> {
        match self.top()? {
            Object::Sequence(list) => list.extend(members),
            _ => return Err(refused("something is appended to what isn't a list")),
        }
        Ok(())
    }

    fn insert(&mut self, entries: &[Id]) -> Result<(), TfmError> {
        let (pairs, []) = entries.as_chunks::<2>() else { return Err(refused("a key has no value")) };
        match self.top()? {
            Object::Dict(dict) => dict.extend(pairs.iter().map(|[key, value]| (*key, *value))),
            _ => return Err(refused("an entry is put into what isn't a dictionary")),
        }
        Ok(())
    }

    fn remember(&mut self, key: u32) -> Result<(), TfmError> {
        let id = self.stack.last().copied().ok_or_else(|| refused("the stack is empty"))?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), TfmError> {
        let id = *self.memo.get(&key).ok_or_else(|| refused(format!("memo {key} is missing")))?;
        self.stack.push(id);
        Ok(())
    }
}

fn refused(reason: impl std::fmt::Display) -> TfmError {
    TfmError::format("pickle", reason)
}

/// Largest pickle, bytes; tensors' values are not part of it.
pub(crate) const MAX_PICKLE_BYTES: usize = 16 << 20;
/// Most objects of a pickle.
pub(crate) const MAX_OBJECTS: usize = 1 << 20;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::{MAX_OBJECTS, MAX_PICKLE_BYTES, Object, Pickle};
    use crate::error::TfmError;

    /// `pickle.dumps({"a": [1, -2, 2.5, None, True], "b": (70000, "x"), "c": -2**40}, protocol=2)` of CPython 3.11.
    #[test]
    fn plain_data_reads_as_python_wrote_it() {
        let bytes = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01]q\x02(K\x01J\xfe\xff\xff\xffG@\x04\x00\x00\x00\x00\x00\x00N\x88eX\x01\x00\x00\x00bq\x03Jp\x11\x01\x00X\x01\x00\x00\x00xq\x04\x86q\x05X\x01\x00\x00\x00cq\x06\x8a\x06\x00\x00\x00\x00\x00\xffu.";
        let pickle = Pickle::read(bytes).unwrap();
        let entry = |key| pickle.entry(pickle.root(), key).unwrap();
        let list: Vec<_> =
            pickle.sequence(entry("a")).unwrap().iter().map(|id| pickle.get(*id).unwrap().clone()).collect();
        let expected =
            [Object::Int(1), Object::Int(-2), Object::Float(2.5), Object::None, Object::Bool(true)];
        assert_eq!(list, expected);
        let pair = pickle.sequence(entry("b")).unwrap();
        assert_eq!((pickle.count(pair[0]), pickle.text(pair[1])), (Some(70_000), Some("x")));
        assert_eq!(pickle.get(entry("c")), Some(&Object::Int(-(1 << 40))));
    }

    /// A call is data: `os.system("id")` reads as a name and its arguments, and nothing more happens.
    #[test]
    fn calls_are_names_only() {
        let pickle = Pickle::read(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.").unwrap();
        let (name, arguments) = pickle.call(pickle.root()).unwrap();
        assert_eq!((name, pickle.text(arguments[0])), ("os.system", Some("id")));
    }

    #[test]
    fn broken_pickles_are_refused_by_name() {
        let refused = |bytes: &[u8]| Pickle::read(bytes).unwrap_err().to_string();
        assert!(refused(b"").contains("ends early"));
        assert!(refused(b"\x80\x02X\xff\xff\xff\xffab").contains("ends early"));
        assert!(refused(b"(I1\n.").contains("0x49"));
        assert!(refused(b".").contains("stack is empty"));
        assert!(refused(b"h\x00.").contains("memo 0"));
        assert!(refused(b"K\x01u.").contains("mark is missing"));
        assert!(refused(b"}(K\x01u.").contains("no value"));
        assert!(refused(b"K\x01(K\x02e.").contains("isn't a list"));
        assert!(refused(b"\x8a\x09123456789.").contains("8 bytes"));
        assert!(refused(b"\x87.").contains("stack is empty"));
        // Marks above a stack that shrank below them.
        assert!(refused(b"K\x01(0.").contains("0x30"));
        // A dictionary that holds itself is data, too.
        assert!(Pickle::read(b"}q\x00X\x01\x00\x00\x00ah\x00s.").is_ok());
    }

    #[test]
    fn limits_hold_at_one_above() {
        let mut bytes = vec![b'N'; MAX_OBJECTS];
        bytes.push(b'.');
        assert!(Pickle::read(&bytes).is_ok());
        bytes.insert(0, b'N');
        assert!(matches!(Pickle::read(&bytes), Err(TfmError::TooLarge { limit: MAX_OBJECTS, .. })));
        let large = vec![b'N'; MAX_PICKLE_BYTES + 1];
        assert!(matches!(Pickle::read(&large), Err(TfmError::TooLarge { limit: MAX_PICKLE_BYTES, .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Pickle::read(&bytes);
        }

        #[test]
        fn arbitrary_operations_never_panic(
            codes in proptest::collection::vec(prop::sample::select(&b"(N\x88K)]t\x85\x86\x87}aesuqhQRb.\x94\x93"[..]), 0..200),
        ) {
            let _ = Pickle::read(&codes);
        }
    }
}
