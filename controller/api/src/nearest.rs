//! "Did you mean …?"

/// The known word that a mistyped one most likely stands for; `None` if none is near.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = word.chars().count().div_ceil(3).max(1);
    known
        .into_iter()
        .map(|known| (strsim::damerau_levenshtein(word, known), known))
        .filter(|(distance, _)| *distance <= near)
        .min()
        .map(|(_, known)| known)
}
