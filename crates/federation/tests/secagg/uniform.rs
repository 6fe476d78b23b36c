//! Masked vectors look uniform, byte by byte, whatever is under the mask.

use tabmesh_federation::secagg::mask::{RingVector, Width};

use crate::world::{Shape, Stage, World};

/// Chi-square of byte values for each position within a word of four, the largest of the four.
///
/// 255 degrees of freedom. Above [`LIMIT`] with a chance below 1e-6 for a uniform vector (four positions included).
pub(crate) fn chi_square_of_bytes(bytes: &[u8]) -> f64 {
    let words = bytes.as_chunks::<4>().0;
    let expected = words.len() as f64 / 256.0;
    (0..4)
        .map(|position| {
            let mut counts = [0_u32; 256];
            words.iter().for_each(|word| counts[usize::from(word[position])] += 1);
            counts.iter().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum::<f64>()
        })
        .fold(0.0, f64::max)
}

/// Upper 2.5e-7 quantile of chi-square with 255 degrees of freedom, rounded up
/// (Python: `scipy.stats.chi2.isf(2.5e-7, 255)`).
pub(crate) const LIMIT: f64 = 386.0;

// n = 40,000 words (80,000 of the wide ones), fixed generators; false alarms below 1e-6 a vector.
#[test]
fn masked_vectors_are_uniform_and_plain_ones_are_not() {
    for width in [Width::Bits32, Width::Bits64] {
        let world = World::new(Shape { width, ..Shape::complete(4, 40_000) });
        let stage = Stage::masked(world.clone());
        for masked in &stage.masked {
            let chi = chi_square_of_bytes(&masked.payload);
            assert!(chi < LIMIT, "{width:?}: {chi}");
        }
        let noised = world.contribution(0, 1);
        let plain =
            RingVector::encode(width, noised.values().as_slice(), world.descriptor.max_abs).to_bytes();
        assert!(chi_square_of_bytes(&plain) > LIMIT, "the test sees what isn't uniform");
    }
}
