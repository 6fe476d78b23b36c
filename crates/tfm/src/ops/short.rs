//! Attention within short sequences on slices, forward and back, whatever the size of a head.
//!
//! The usual sizes run eight queries side by side ([`super::lanes`]); any other runs in plain loops, which are also what
//! the fast ones are tested against.

use super::{attention::Sizes, lanes, math::softmax};

/// Sequences that attend within themselves: `q (items, queries, width)` to `kv (items, keys, 2 width)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sequences {
    pub(crate) items: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) width: usize,
    pub(crate) heads: usize,
}

impl Sequences {
    fn sizes(self) -> Sizes {
        Sizes {
            batch: self.items,
            shared_query: false,
            queries: self.queries,
            keys: self.keys,
            width: self.width,
            heads: self.heads,
        }
    }

    /// What queries read, `(items, queries, width)`.
    pub(crate) fn attend(self, q: &[f32], kv: &[f32], out: &mut [f32]) {
        match self.width / self.heads {
            8 => lanes::forward::<8>(self.sizes(), q, kv, out),
            16 => lanes::forward::<16>(self.sizes(), q, kv, out),
            32 => lanes::forward::<32>(self.sizes(), q, kv, out),
            _ => self.attend_plainly(q, kv, out),
        }
    }

    /// Adds gradients of queries, and of keys and values, from that of what was read.
    pub(crate) fn attend_back(
        self,
        q: &[f32],
        kv: &[f32],
        gradient: &[f32],
        (dq, dkv): (&mut [f32], &mut [f32]),
    ) {
        match self.width / self.heads {
            8 => lanes::backward::<8>(self.sizes(), q, kv, gradient, dq, Some(dkv)),
            16 => lanes::backward::<16>(self.sizes(), q, kv, gradient, dq, Some(dkv)),
            32 => lanes::backward::<32>(self.sizes(), q, kv, gradient, dq, Some(dkv)),
            _ => self.attend_back_plainly(q, kv, gradient, dq, dkv),
        }
    }

    fn attend_plainly(self, q: &[f32], kv: &[f32], out: &mut [f32]) {
        let mut p = vec![0f32; self.keys];
        for place in self.places() {
            let keys_values = &kv[place.keys..][..self.keys * 2 * self.width];
            self.probabilities(&q[place.query..][..self.head_dim()], keys_values, place.head, &mut p);
            let to = &mut out[place.query..][..self.head_dim()];
            to.fill(0.0);
            for (p, row) in p.iter().zip(keys_values.chunks_exact(2 * self.width)) {
                to.iter_mut().zip(&row[self.width + place.head..]).for_each(|(o, v)| *o += p * v);
            }
        }
    }

    fn attend_back_plainly(self, q: &[f32], kv: &[f32], g: &[f32], dq: &mut [f32], dkv: &mut [f32]) {
        let (head_dim, stride) = (self.head_dim(), 2 * self.width);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (mut p, mut ds) = (vec![0f32; self.keys], vec![0f32; self.keys]);
        for place in self.places() {
            let keys_values = &kv[place.keys..][..self.keys * stride];
            let (query, out) = (&q[place.query..][..head_dim], &g[place.query..][..head_dim]);
            self.probabilities(query, keys_values, place.head, &mut p);
            for (d, row) in ds.iter_mut().zip(keys_values.chunks_exact(stride)) {
                *d = out.iter().zip(&row[self.width + place.head..]).map(|(g, v)| g * v).sum();
            }
            let mean: f32 = ds.iter().zip(&p).map(|(d, p)| d * p).sum();
            let sinks = dkv[place.keys..][..self.keys * stride].chunks_exact_mut(stride);
            for (((d, p), row), sink) in ds.iter().zip(&p).zip(keys_values.chunks_exact(stride)).zip(sinks) {
                let slope = p * (d - mean) * scale;
                let (dk, dv) = sink.split_at_mut(self.width);
                for i in 0..head_dim {
                    dq[place.query + i] += slope * row[place.head + i];
                    dk[place.head + i] += slope * query[i];
                    dv[place.head + i] += p * out[i];
                }
            }
        }
    }

    fn probabilities(self, query: &[f32], keys_values: &[f32], head: usize, p: &mut [f32]) {
        for (p, row) in p.iter_mut().zip(keys_values.chunks_exact(2 * self.width)) {
            *p = query.iter().zip(&row[head..]).map(|(q, k)| q * k).sum();
        }
        softmax::<false>(p, 1.0 / (query.len() as f32).sqrt());
    }

    fn head_dim(self) -> usize {
        self.width / self.heads
    }

    /// Where each head of each query stands.
    fn places(self) -> impl Iterator<Item = Place> {
        (0..self.items * self.queries * self.heads).map(move |i| {
            let (row, head) = (i / self.heads, i % self.heads * self.head_dim());
            let keys = row / self.queries * self.keys * 2 * self.width;
            Place { query: row * self.width + head, keys, head }
        })
    }
}

/// One head of one query.
struct Place {
    /// First feature among the queries.
    query: usize,
    /// First key of the item.
    keys: usize,
    /// First feature of the head in a row.
    head: usize,
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::Sequences;

    fn apart(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// Fast loops against plain ones, and both gradients against central differences of a weighted sum of what is read.
    #[test]
    fn fast_and_plain_loops_agree_with_each_other_and_with_differences() {
        for head_dim in [2usize, 4, 6, 8, 16, 32] {
            let s = Sequences { items: 3, queries: 5, keys: 11, width: 2 * head_dim, heads: 2 };
            let mut rng = ChaCha20Rng::seed_from_u64(head_dim as u64);
            let mut draw = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0f32)).collect::<Vec<_>>();
            let (q, kv) = (draw(3 * 5 * s.width), draw(3 * 11 * 2 * s.width));
            let weights = draw(q.len());
            let mut plain = vec![0f32; q.len()];
            s.attend_plainly(&q, &kv, &mut plain);
            let attend = |q: &[f32], kv: &[f32]| {
                let mut out = vec![f32::NAN; q.len()];
                s.attend(q, kv, &mut out);
                out
            };
            assert!(apart(&attend(&q, &kv), &plain) < 2e-6);
            let (mut dq, mut dkv) = (vec![0f32; q.len()], vec![0f32; kv.len()]);
            s.attend_back_plainly(&q, &kv, &weights, &mut dq, &mut dkv);
            let mut fast = (vec![0f32; q.len()], vec![0f32; kv.len()]);
            s.attend_back(&q, &kv, &weights, (&mut fast.0, &mut fast.1));
            assert!(apart(&fast.0, &dq) < 5e-6 && apart(&fast.1, &dkv) < 5e-6, "{head_dim}");
            let loss = |q: &[f32], kv: &[f32]| -> f64 {
                attend(q, kv).iter().zip(&weights).map(|(o, w)| f64::from(*o) * f64::from(*w)).sum()
            };
            let moved = |values: &[f32], at: usize, by: f32| {
                let mut values = values.to_vec();
                values[at] += by;
                values
            };
            for at in (0..q.len()).step_by(7) {
                let numeric = (loss(&moved(&q, at, 0.01), &kv) - loss(&moved(&q, at, -0.01), &kv)) / 0.02;
                assert!((numeric - f64::from(dq[at])).abs() < 2e-3, "{head_dim} query {at}");
            }
            for at in (0..kv.len()).step_by(13) {
                let numeric = (loss(&q, &moved(&kv, at, 0.01)) - loss(&q, &moved(&kv, at, -0.01))) / 0.02;
                assert!((numeric - f64::from(dkv[at])).abs() < 2e-3, "{head_dim} key or value {at}");
            }
        }
    }
}
