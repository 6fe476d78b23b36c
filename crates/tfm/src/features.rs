//! Feature texts as vectors: hashed character n-grams and words, the input of the feature tokens.
//!
//! Training-free and deterministic, so two parties that declare the same text get the same vector.

/// A unit vector of `dim` entries (all zero for a text without letters or digits).
///
/// Words and their n-grams of 3 to 5 characters, lower-cased, hashed with a sign (FNV-1a, 64 bit).
#[must_use]
pub fn text_vector(text: &str, dim: usize) -> Vec<f32> {
    let mut vector = vec![0f32; dim];
    if dim == 0 {
        return vector;
    }
    let lower = text.to_lowercase();
    for word in lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()) {
        let padded: Vec<char> = format!("^{word}$").chars().collect();
        add(&mut vector, padded.iter().copied(), 2.0);
        for n in 3..=5 {
            for gram in padded.windows(n) {
                add(&mut vector, gram.iter().copied(), 1.0);
            }
        }
    }
    let norm = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    if norm > 0.0 {
        vector.iter_mut().for_each(|v| *v /= norm);
    }
    vector
}

/// Vectors of several texts, end to end.
#[must_use]
pub fn text_vectors(texts: &[String], dim: usize) -> Vec<f32> {
    texts.iter().flat_map(|t| text_vector(t, dim)).collect()
}

fn add(vector: &mut [f32], gram: impl Iterator<Item = char>, weight: f32) {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut utf8 = [0u8; 4];
    for c in gram {
        for byte in c.encode_utf8(&mut utf8).bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    // FNV's low bits mix poorly for short inputs; one multiply-shift spreads them.
    let mixed = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let slot = ((mixed >> 33) % vector.len() as u64) as usize;
    vector[slot] += if mixed & 1 == 0 { weight } else { -weight };
}

#[cfg(test)]
mod tests {
    use super::text_vector;

    fn cosine(a: &str, b: &str) -> f32 {
        text_vector(a, 64).iter().zip(text_vector(b, 64)).map(|(x, y)| x * y).sum()
    }

    #[test]
    fn similar_texts_are_closer_than_unrelated_ones() {
        assert!((cosine("person.age", "Person AGE") - 1.0).abs() < 1e-5);
        let (related, unrelated) = (
            cosine("customer.age years", "person.age years"),
            cosine("customer.age years", "invoice.total eur"),
        );
        assert!(related > unrelated + 0.2, "{related} {unrelated}");
        assert!(text_vector("...", 8).iter().all(|v| v.abs() < 1e-9) && text_vector("a", 0).is_empty());
    }
}
