//! Lists that entries leave again, and in which equal entries are two.

use std::collections::BTreeSet;

use super::rows::Rows;

/// Entries by index. One that is taken away leaves a hole; the lowest is the next to be filled, and the list never ends in
/// one.
#[derive(Debug)]
pub(super) struct Holed<T> {
    pub(super) list: Rows<T>,
    holes: BTreeSet<u32>,
    /// What is written in a hole: it refers to nothing that may not be there.
    hole: T,
}

impl<T: Copy + PartialEq> Holed<T> {
    pub(super) fn new(hole: T) -> Self {
        Self { list: Rows::default(), holes: BTreeSet::new(), hole }
    }

    /// The index that it has from now on.
    pub(super) fn put(&mut self, entry: T) -> u32 {
        match self.holes.pop_first() {
            Some(hole) => {
                self.list.set(hole as usize, entry);
                hole
            }
            None => {
                self.list.push(entry);
                self.list.len() as u32 - 1
            }
        }
    }

    pub(super) fn get(&self, index: u32) -> Option<T> {
        self.list.get(index as usize).copied()
    }

    pub(super) fn set(&mut self, index: u32, entry: T) {
        self.list.set(index as usize, entry);
    }

    pub(super) fn take(&mut self, index: u32) {
        self.list.set(index as usize, self.hole);
        self.holes.insert(index);
        while let Some(last) = self.holes.last().copied().filter(|last| *last as usize + 1 == self.list.len()) {
            self.holes.remove(&last);
            self.list.pop();
        }
    }

    /// How many entries there are.
    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.list.len() - self.holes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_away_leaves_a_hole_that_is_filled_next() {
        let mut words: Holed<u32> = Holed::new(0);
        assert_eq!([7, 8, 8, 9].map(|word| words.put(word)), [0, 1, 2, 3]);
        words.take(1);
        words.take(0);
        assert!(words.list.iter().eq(&[0, 0, 8, 9]));
        assert_eq!((words.put(5), words.used(), words.get(0)), (0, 3, Some(5)));
        words.take(3);
        words.take(2);
        assert!(words.list.iter().eq(&[5]), "no list ends in holes");
        words.set(0, 6);
        assert_eq!((words.get(0), words.get(1), words.put(4)), (Some(6), None, 1));
    }
}
