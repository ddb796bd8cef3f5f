//! The entries of one table, in pieces that tables share which differ little.

use std::fmt;
use std::ops::{Index, IndexMut};
use std::sync::Arc;

/// A list whose copies cost next to nothing: a copy that is changed shares every piece in which nothing was. So what was
/// changed is known without looking at the rest.
pub struct Rows<T> {
    /// All of them but the last are full.
    pieces: Arc<Vec<Piece<T>>>,
}

type Piece<T> = Arc<Vec<T>>;

/// About as many bytes as one piece has: copied when one of its entries is written.
const PIECE_BYTES: usize = 4_096;

impl<T> Rows<T> {
    const PIECE: usize = if size_of::<T>() >= PIECE_BYTES { 1 } else { PIECE_BYTES / size_of::<T>() };

    pub fn len(&self) -> usize {
        self.pieces.last().map_or(0, |last| (self.pieces.len() - 1) * Self::PIECE + last.len())
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    pub fn get(&self, index: usize) -> Option<&T> {
        self.pieces.get(index / Self::PIECE)?.get(index % Self::PIECE)
    }

    pub fn first(&self) -> Option<&T> {
        self.get(0)
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> + Clone {
        self.pieces.iter().flat_map(|piece| piece.iter())
    }

    /// Whether they are the very same.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.pieces, &other.pieces)
    }

    /// The entries, with their indices, of the pieces that are not those of `known`. Its other entries are the same.
    pub fn unshared<'a>(&'a self, known: Option<&'a Self>) -> impl Iterator<Item = (usize, &'a T)> {
        let same = known.is_some_and(|known| self.is_same(known));
        let pieces = self.pieces.iter().enumerate().filter(move |(number, piece)| {
            let known = known.and_then(|known| known.pieces.get(*number));
            !same && !known.is_some_and(|known| Arc::ptr_eq(known, piece))
        });
        pieces.flat_map(|(number, piece)| (number * Self::PIECE..).zip(piece.iter()))
    }
}

impl<T: Clone> Rows<T> {
    pub fn push(&mut self, value: T) {
        let pieces = Arc::make_mut(&mut self.pieces);
        match pieces.last_mut().filter(|last| last.len() < Self::PIECE) {
            Some(last) => Arc::make_mut(last).push(value),
            None => pieces.push(Arc::new(vec![value])),
        }
    }

    pub fn pop(&mut self) -> Option<T> {
        let pieces = Arc::make_mut(&mut self.pieces);
        let last = Arc::make_mut(pieces.last_mut()?);
        let value = last.pop();
        if last.is_empty() {
            pieces.pop();
        }
        value
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        Arc::make_mut(&mut self.pieces).iter_mut().flat_map(|piece| Arc::make_mut(piece).iter_mut())
    }

    /// Writes an entry that is there; what it says already is not written.
    pub(super) fn set(&mut self, index: usize, value: T)
    where
        T: PartialEq,
    {
        if self.get(index).is_some_and(|old| *old != value) {
            self[index] = value;
        }
    }
}

impl<T> Default for Rows<T> {
    fn default() -> Self {
        Self { pieces: Arc::default() }
    }
}

impl<T> Clone for Rows<T> {
    fn clone(&self) -> Self {
        Self { pieces: Arc::clone(&self.pieces) }
    }
}

impl<T> FromIterator<T> for Rows<T> {
    fn from_iter<I: IntoIterator<Item = T>>(entries: I) -> Self {
        let mut entries = entries.into_iter();
        let piece = || {
            let piece: Vec<T> = entries.by_ref().take(Self::PIECE).collect();
            (!piece.is_empty()).then(|| Arc::new(piece))
        };
        Self { pieces: Arc::new(std::iter::from_fn(piece).collect()) }
    }
}

impl<T> From<Vec<T>> for Rows<T> {
    fn from(entries: Vec<T>) -> Self {
        entries.into_iter().collect()
    }
}

impl<T: PartialEq> PartialEq for Rows<T> {
    fn eq(&self, other: &Self) -> bool {
        let pair = |(a, b): (&Piece<T>, &Piece<T>)| Arc::ptr_eq(a, b) || a == b;
        self.is_same(other)
            || self.pieces.len() == other.pieces.len() && self.pieces.iter().zip(&*other.pieces).all(pair)
    }
}

impl<T: Eq> Eq for Rows<T> {}

impl<T: fmt::Debug> fmt::Debug for Rows<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<T> Index<usize> for Rows<T> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        &self.pieces[index / Self::PIECE][index % Self::PIECE]
    }
}

impl<T: Clone> IndexMut<usize> for Rows<T> {
    fn index_mut(&mut self, index: usize) -> &mut T {
        &mut Arc::make_mut(&mut Arc::make_mut(&mut self.pieces)[index / Self::PIECE])[index % Self::PIECE]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Push(u64),
        Pop,
        Set(prop::sample::Index, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => any::<u64>().prop_map(Step::Push),
            1 => Just(Step::Pop),
            3 => (any::<prop::sample::Index>(), 0..4u64).prop_map(|(index, value)| Step::Set(index, value)),
        ]
    }

    proptest! {
        /// Breaks if a copy sees what is done to the other, or a change is not among what is not shared.
        #[test]
        fn rows_are_a_list_and_what_is_shared_is_the_same(
            start in prop::collection::vec(0..4u64, 0..1_400),
            steps in prop::collection::vec(step(), 0..40),
        ) {
            let (mut list, mut rows) = (start.clone(), Rows::from(start.clone()));
            let known = rows.clone();
            for step in steps {
                match step {
                    Step::Push(value) => {
                        list.push(value);
                        rows.push(value);
                    }
                    Step::Pop => prop_assert_eq!(rows.pop(), list.pop()),
                    Step::Set(index, value) if !list.is_empty() => {
                        let at = index.index(list.len());
                        list[at] = value;
                        rows.set(at, value);
                    }
                    Step::Set(..) => rows.set(0, 1),
                }
            }
            prop_assert!(rows.iter().eq(&list));
            prop_assert!(known.iter().eq(&start));
            prop_assert_eq!((rows.len(), rows.is_empty(), rows.first()), (list.len(), list.is_empty(), list.first()));
            prop_assert_eq!(rows == known, list == start);
            let unshared: Vec<usize> = rows.unshared(Some(&known)).map(|(index, value)| {
                assert_eq!(rows[index], *value);
                index
            }).collect();
            for index in 0..list.len() {
                prop_assert_eq!(rows.get(index), list.get(index));
                prop_assert!(start.get(index) == list.get(index) || unshared.contains(&index), "{} differs", index);
            }
            prop_assert_eq!(rows.unshared(None).count(), list.len());
        }
    }
}
