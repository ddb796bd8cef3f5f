//! Lists without repetitions, which entries leave again.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

use foldhash::quality::RandomState;

use super::rows::Rows;

/// Values by index. One that nobody holds any more leaves a hole, which is the next to be filled; the list never ends in
/// one.
#[derive(Debug)]
pub(super) struct Interned<T> {
    pub(super) list: Rows<T>,
    /// How many hold the value of each index.
    holders: Vec<usize>,
    index: HashMap<T, u32, RandomState>,
    holes: BTreeSet<u32>,
    /// What is written in a hole: it refers to nothing that may not be there.
    hole: T,
}

impl<T: Copy + Eq + Hash> Interned<T> {
    pub(super) fn new(hole: T) -> Self {
        Self { list: Rows::default(), holders: Vec::new(), index: HashMap::default(), holes: BTreeSet::new(), hole }
    }

    /// The value's index; if it is new nobody holds it yet.
    pub(super) fn intern(&mut self, value: T) -> u32 {
        if let Some(index) = self.index.get(&value) {
            return *index;
        }
        let index = match self.holes.pop_first() {
            Some(hole) => {
                self.list.set(hole as usize, value);
                hole
            }
            None => {
                self.list.push(value);
                self.holders.push(0);
                self.list.len() as u32 - 1
            }
        };
        self.index.insert(value, index);
        index
    }

    /// One more holds it; whether it is the first.
    pub(super) fn hold(&mut self, index: u32) -> bool {
        let holders = &mut self.holders[index as usize];
        *holders += 1;
        *holders == 1
    }

    /// One less holds it: the value, if that was the last.
    pub(super) fn let_go(&mut self, index: u32) -> Option<T> {
        let value = self.list[index as usize];
        self.holders[index as usize] -= 1;
        self.free_unheld(index);
        (!self.index.contains_key(&value)).then_some(value)
    }

    pub(super) fn free_unheld(&mut self, index: u32) {
        let free = self.holders.get(index as usize) == Some(&0) && !self.holes.contains(&index);
        if !free {
            return;
        }
        self.index.remove(&self.list[index as usize]);
        self.list.set(index as usize, self.hole);
        self.holes.insert(index);
        while let Some(last) = self.holes.last().copied().filter(|last| *last as usize + 1 == self.list.len()) {
            self.holes.remove(&last);
            self.list.pop();
            self.holders.pop();
        }
    }

    /// Puts a value in the place of another, if that is there.
    pub(super) fn replace(&mut self, old: T, new: T) {
        if old != new
            && let Some(index) = self.index.remove(&old)
        {
            self.list.set(index as usize, new);
            self.index.insert(new, index);
        }
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.index.keys()
    }

    /// How many values there are.
    pub(super) fn used(&self) -> usize {
        self.index.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_holds_leaves_a_hole_that_is_filled_next() {
        let mut words: Interned<u32> = Interned::new(0);
        let held = [7, 8, 9].map(|word| {
            let index = words.intern(word);
            assert!(words.hold(index));
            index
        });
        assert_eq!(held, [0, 1, 2]);
        assert!(!words.hold(1), "a second holder");
        assert_eq!((words.let_go(1), words.let_go(1)), (None, Some(8)));
        assert!(words.list.iter().eq(&[7, 0, 9]));
        assert_eq!((words.intern(9), words.intern(5), words.used()), (2, 1, 3));
        words.free_unheld(1);
        assert_eq!(words.let_go(2), Some(9));
        assert!(words.list.iter().eq(&[7]), "no list ends in holes");
        words.free_unheld(1);
        words.free_unheld(0);
        words.replace(7, 6);
        assert_eq!((words.intern(6), words.used()), (0, 1));
        words.replace(7, 5);
        assert_eq!((words.intern(6), words.used()), (0, 1));
    }
}
