//! A row-only student: a small perceptron that answers as a teacher would, without a context.
//!
//! It reads the same encoded columns as the model and is fitted to the teacher's probabilities (Hinton, Vinyals and
//! Dean 2015, arXiv 1503.02531, at temperature 1) by Adam with a cosine schedule; the epoch with the least cross-entropy
//! on held-out rows is kept. One row costs a few thousand multiplications. Binary targets. What it learnt from real rows
//! is a domain's own: nothing here has a wire form.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::{read_floats, write_floats},
    error::TfmError,
    table::EncodedTable,
};

/// Two hidden layers on encoded columns.
#[derive(Debug, Clone, PartialEq)]
pub struct Student {
    keys: Vec<String>,
    layers: Vec<Layer>,
}

/// How a student is fitted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fitting {
    /// Units of each hidden layer, 1 to [`MAX_HIDDEN`].
    pub hidden: usize,
    /// Passes over the rows.
    pub epochs: usize,
    /// Seed of weights, held-out rows and order.
    pub seed: u64,
}

impl Default for Fitting {
    fn default() -> Self {
        Self { hidden: 64, epochs: 60, seed: 0 }
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Layer {
    inputs: usize,
    /// `(outputs, inputs)`, row by row.
    weights: Vec<f32>,
    biases: Vec<f32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    keys: Vec<String>,
    hidden: usize,
    /// What it was distilled from.
    teacher: String,
}

impl Student {
    /// Fits a student to a teacher's probabilities of class 1, one for each row; `progress` hears of each epoch its
    /// number and the held-out cross-entropy.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for fewer than [`MIN_ROWS`] rows, another number of probabilities than rows, or one outside
    /// `[0, 1]`; [`TfmError::TooLarge`] for too many hidden units.
    pub fn fit(
        rows: &EncodedTable,
        teacher: &[f64],
        fitting: Fitting,
        progress: &mut dyn FnMut(usize, f64),
    ) -> Result<Self, TfmError> {
        rows.check()?;
        if rows.columns == 0 {
            return Err(TfmError::mismatch("columns to learn from", "at least 1", 0));
        }
        if rows.rows < MIN_ROWS {
            return Err(TfmError::mismatch("rows to learn from", format!("at least {MIN_ROWS}"), rows.rows));
        }
        if teacher.len() != rows.rows {
            return Err(TfmError::mismatch("teacher's probabilities", rows.rows, teacher.len()));
        }
        if let Some(bad) = teacher.iter().find(|p| !(0.0..=1.0).contains(*p)) {
            return Err(TfmError::mismatch("teacher's probability", "0 to 1", bad));
        }
        if !(1..=MAX_HIDDEN).contains(&fitting.hidden) {
            return Err(TfmError::TooLarge { what: "hidden units", got: fitting.hidden, limit: MAX_HIDDEN });
        }
        let mut rng = ChaCha20Rng::seed_from_u64(fitting.seed);
        let mut order: Vec<usize> = (0..rows.rows).collect();
        order.shuffle(&mut rng);
        let held = order.split_off(rows.rows - (rows.rows / HELD_OUT_SHARE).max(1));
        let mut student = Self::random(rows.column_keys.clone(), fitting.hidden, &mut rng);
        let mut adam = Adam::new(&student.layers);
        let entropy = |student: &Self| {
            let loss = |row: &usize| cross_entropy(student.logit(rows.row(*row)), teacher[*row]);
            held.iter().map(loss).sum::<f64>() / held.len() as f64
        };
        let mut best = (student.clone(), entropy(&student));
        let steps = fitting.epochs * order.len().div_ceil(BATCH);
        for epoch in 0..fitting.epochs {
            order.shuffle(&mut rng);
            for batch in order.chunks(BATCH) {
                let mut gradient: Vec<Layer> = student.layers.iter().map(Layer::zeros_like).collect();
                for &row in batch {
                    student.accumulate(rows.row(row), teacher[row] as f32, &mut gradient);
                }
                adam.step(&mut student.layers, &gradient, 1.0 / batch.len() as f32, steps);
            }
            let loss = entropy(&student);
            progress(epoch, loss);
            if loss < best.1 {
                best = (student.clone(), loss);
            }
        }
        Ok(best.0)
    }

    /// Keys of the columns it reads, in this order.
    #[must_use]
    pub fn column_keys(&self) -> &[String] {
        &self.keys
    }

    /// Logits of class 1, one per row.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if columns differ from those it was fitted on.
    pub fn logits(&self, rows: &EncodedTable) -> Result<Vec<f64>, TfmError> {
        rows.check()?;
        if rows.column_keys != self.keys {
            return Err(TfmError::mismatch("query columns", self.keys.join(","), rows.column_keys.join(",")));
        }
        Ok((0..rows.rows).map(|row| self.logit(rows.row(row))).collect())
    }

    /// The student as a safetensors file; `teacher` names what it was distilled from.
    ///
    /// # Errors
    /// [`TfmError::Format`] if serialisation fails.
    pub fn to_safetensors(&self, teacher: &str) -> Result<Vec<u8>, TfmError> {
        let hidden = self.layers.first().map_or(0, |layer| layer.biases.len());
        let (format, keys, teacher) = (FORMAT.to_owned(), self.keys.clone(), teacher.to_owned());
        let mut tensors = BTreeMap::new();
        for (at, layer) in self.layers.iter().enumerate() {
            let shape = vec![layer.biases.len(), layer.inputs];
            tensors.insert(format!("layers.{at}.weight"), (shape, layer.weights.clone()));
            tensors.insert(format!("layers.{at}.bias"), (vec![layer.biases.len()], layer.biases.clone()));
        }
        write_floats(&Header { format, keys, hidden, teacher }, &tensors)
    }

    /// Reads a student's file, and what it was distilled from.
    ///
    /// # Errors
    /// [`TfmError::TooLarge`], [`TfmError::Format`], [`TfmError::MissingTensor`], [`TfmError::ExtraTensor`],
    /// [`TfmError::WrongShape`] or [`TfmError::NotFinite`] for a file that isn't a student.
    pub fn from_safetensors(bytes: &[u8]) -> Result<(Self, String), TfmError> {
        let (header, mut tensors): (Header, _) = read_floats("student file", bytes, MAX_STUDENT_BYTES)?;
        if header.format != FORMAT {
            let reason = format!("expected format {FORMAT:?}, got {:?}", header.format);
            return Err(TfmError::format("student file", reason));
        }
        if header.keys.is_empty() || !(1..=MAX_HIDDEN).contains(&header.hidden) {
            let reason = format!("{} columns and {} hidden units", header.keys.len(), header.hidden);
            return Err(TfmError::format("student file", reason));
        }
        let mut take = |name: String, expected: Vec<usize>| {
            let (got, values) =
                tensors.remove(&name).ok_or_else(|| TfmError::MissingTensor { name: name.clone() })?;
            if got != expected {
                return Err(TfmError::WrongShape { name, expected, got });
            }
            if values.iter().any(|value: &f32| !value.is_finite()) {
                return Err(TfmError::NotFinite { name });
            }
            Ok(values)
        };
        let mut layers = Vec::new();
        for (at, (inputs, outputs)) in sizes(header.keys.len(), header.hidden).into_iter().enumerate() {
            let weights = take(format!("layers.{at}.weight"), vec![outputs, inputs])?;
            let biases = take(format!("layers.{at}.bias"), vec![outputs])?;
            layers.push(Layer { inputs, weights, biases });
        }
        if let Some(name) = tensors.into_keys().next() {
            return Err(TfmError::ExtraTensor { name });
        }
        Ok((Self { keys: header.keys, layers }, header.teacher))
    }

    /// He-initialised weights (He et al. 2015, arXiv 1502.01852), zero biases.
    fn random(keys: Vec<String>, hidden: usize, rng: &mut ChaCha20Rng) -> Self {
        let layers = sizes(keys.len(), hidden).into_iter().map(|(inputs, outputs)| {
            let bound = (6.0 / inputs.max(1) as f32).sqrt();
            let weights = (0..inputs * outputs).map(|_| rng.random_range(-bound..bound)).collect();
            Layer { inputs, weights, biases: vec![0.0; outputs] }
        });
        let layers = layers.collect();
        Self { keys, layers }
    }

    fn logit(&self, row: &[f32]) -> f64 {
        let out = self.activations(row).pop();
        out.and_then(|last| last.first().copied()).map_or(0.0, f64::from)
    }

    /// What each layer gives, rectified but for the last.
    fn activations(&self, row: &[f32]) -> Vec<Vec<f32>> {
        let mut all: Vec<Vec<f32>> = Vec::with_capacity(self.layers.len());
        for (at, layer) in self.layers.iter().enumerate() {
            let input = all.last().map_or(row, Vec::as_slice);
            let mut out = layer.forward(input);
            if at + 1 < self.layers.len() {
                out.iter_mut().for_each(|value| *value = value.max(0.0));
            }
            all.push(out);
        }
        all
    }

    /// Adds the gradient of one row's cross-entropy.
    fn accumulate(&self, row: &[f32], target: f32, gradient: &mut [Layer]) {
        let activations = self.activations(row);
        let Some(logit) = activations.last().and_then(|last| last.first()) else { return };
        let mut delta = vec![1.0 / (1.0 + (-logit).exp()) - target];
        for at in (0..self.layers.len()).rev() {
            let input = if at == 0 { row } else { activations[at - 1].as_slice() };
            let (layer, sums) = (&self.layers[at], &mut gradient[at]);
            let mut before = vec![0f32; layer.inputs];
            for ((d, weights), (sum, bias)) in delta
                .iter()
                .zip(layer.weights.chunks_exact(layer.inputs))
                .zip(sums.weights.chunks_exact_mut(layer.inputs).zip(&mut sums.biases))
            {
                *bias += d;
                for ((w, s), (b, x)) in weights.iter().zip(sum).zip(before.iter_mut().zip(input)) {
                    *s += d * x;
                    *b += d * w;
                }
            }
            // Rectified units that gave nothing pass nothing on.
            before.iter_mut().zip(input).for_each(|(b, x)| *b = if at > 0 && *x <= 0.0 { 0.0 } else { *b });
            delta = before;
        }
    }
}

impl Layer {
    fn zeros_like(&self) -> Self {
        let (weights, biases) = (vec![0.0; self.weights.len()], vec![0.0; self.biases.len()]);
        Self { inputs: self.inputs, weights, biases }
    }

    fn forward(&self, input: &[f32]) -> Vec<f32> {
        let product = |weights: &[f32]| weights.iter().zip(input).map(|(w, x)| w * x).sum::<f32>();
        self.weights.chunks_exact(self.inputs).map(product).zip(&self.biases).map(|(p, b)| p + b).collect()
    }

    fn values(&self) -> impl Iterator<Item = &f32> {
        self.weights.iter().chain(&self.biases)
    }

    fn values_mut(&mut self) -> impl Iterator<Item = &mut f32> {
        self.weights.iter_mut().chain(&mut self.biases)
    }
}

/// Adam (Kingma and Ba 2015, arXiv 1412.6980) with decoupled weight decay and a cosine schedule.
struct Adam {
    first: Vec<f32>,
    second: Vec<f32>,
    done: usize,
}

impl Adam {
    fn new(layers: &[Layer]) -> Self {
        let len = layers.iter().map(|layer| layer.values().count()).sum();
        Self { first: vec![0.0; len], second: vec![0.0; len], done: 0 }
    }

    fn step(&mut self, layers: &mut [Layer], gradient: &[Layer], scale: f32, steps: usize) {
        let share = self.done as f32 / steps.max(1) as f32;
        let rate = RATE * 0.5 * (1.0 + (std::f32::consts::PI * share).cos());
        self.done += 1;
        let power = i32::try_from(self.done).unwrap_or(i32::MAX);
        let corrections = (1.0 - BETA_1.powi(power), 1.0 - BETA_2.powi(power));
        let values = layers.iter_mut().flat_map(Layer::values_mut);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((value, g), (m, v)) in values.zip(gradient.iter().flat_map(Layer::values)).zip(moments) {
            let g = g * scale;
            *m = BETA_1 * *m + (1.0 - BETA_1) * g;
            *v = BETA_2 * *v + (1.0 - BETA_2) * g * g;
            let direction = (*m / corrections.0) / ((*v / corrections.1).sqrt() + 1e-8);
            *value -= rate * (direction + DECAY * *value);
        }
    }
}

/// Inputs and outputs of each layer.
fn sizes(columns: usize, hidden: usize) -> [(usize, usize); 3] {
    [(columns, hidden), (hidden, hidden), (hidden, 1)]
}

fn cross_entropy(logit: f64, target: f64) -> f64 {
    logit.max(0.0) - logit * target + (-logit.abs()).exp().ln_1p()
}

/// Rows below which nothing is fitted.
pub const MIN_ROWS: usize = 20;
/// Most units of a hidden layer.
pub const MAX_HIDDEN: usize = 1024;
/// Largest file: 64 MiB, above what the largest student on the most columns takes.
const MAX_STUDENT_BYTES: usize = 64 << 20;
/// One row in so many is held out.
const HELD_OUT_SHARE: usize = 10;
const BATCH: usize = 64;
const RATE: f32 = 3e-3;
const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.99;
const DECAY: f32 = 1e-3;
const FORMAT: &str = "tabmesh-student-1";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::context::tests::table;

    /// A teacher with an interaction that no linear student can follow.
    fn teacher(rows: &EncodedTable) -> Vec<f64> {
        let p = |row: usize| {
            let x = rows.row(row);
            1.0 / (1.0 + (-f64::from(2.0 * x[0] * x[1] + x[2])).exp())
        };
        (0..rows.rows).map(p).collect()
    }

    #[test]
    fn it_follows_its_teacher_on_rows_it_has_not_seen() {
        let (rows, unseen) = (table(1500, 4, 1), table(300, 4, 2));
        let mut losses = Vec::new();
        let fitting = Fitting { epochs: 40, ..Fitting::default() };
        let student =
            Student::fit(&rows, &teacher(&rows), fitting, &mut |_, loss| losses.push(loss)).unwrap();
        let probability = |logit: f64| 1.0 / (1.0 + (-logit).exp());
        let apart: Vec<f64> = student
            .logits(&unseen)
            .unwrap()
            .into_iter()
            .zip(teacher(&unseen))
            .map(|(logit, p)| (probability(logit) - p).abs())
            .collect();
        let mean = apart.iter().sum::<f64>() / apart.len() as f64;
        assert!(mean < 0.04, "{mean}");
        assert_eq!(losses.len(), 40);
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let rows = table(1, 3, 5);
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let student = Student::random(rows.column_keys.clone(), 5, &mut rng);
        let mut gradient: Vec<Layer> = student.layers.iter().map(Layer::zeros_like).collect();
        student.accumulate(rows.row(0), 0.3, &mut gradient);
        for (layer, got) in gradient.iter().enumerate() {
            let count = got.values().count();
            for at in 0..count {
                let loss = |change: f32| {
                    let mut moved = student.clone();
                    *moved.layers[layer].values_mut().nth(at).unwrap() += change;
                    cross_entropy(moved.logit(rows.row(0)), 0.3)
                };
                let slope = (loss(1e-2) - loss(-1e-2)) / 2e-2;
                let got = f64::from(*got.values().nth(at).unwrap());
                assert!((slope - got).abs() < 2e-3 * (1.0 + got.abs()), "{layer} {at}: {slope} {got}");
            }
        }
    }

    #[test]
    fn equal_seeds_give_equal_files_and_files_come_back() {
        let rows = table(60, 3, 4);
        let fit = |seed| {
            let fitting = Fitting { hidden: 8, epochs: 2, seed };
            Student::fit(&rows, &teacher(&rows), fitting, &mut |_, _| {}).unwrap()
        };
        let bytes = fit(1).to_safetensors("t").unwrap();
        assert_eq!(bytes, fit(1).to_safetensors("t").unwrap());
        assert_ne!(bytes, fit(2).to_safetensors("t").unwrap());
        assert_eq!(Student::from_safetensors(&bytes).unwrap(), (fit(1), "t".to_owned()));
        assert!(Student::from_safetensors(&bytes[..bytes.len() - 4]).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let rows = table(MIN_ROWS, 3, 4);
        let fit = |rows: &EncodedTable, p: &[f64], hidden| {
            let fitting = Fitting { hidden, epochs: 1, seed: 0 };
            Student::fit(rows, p, fitting, &mut |_, _| {})
        };
        let p = vec![0.5; MIN_ROWS];
        let student = fit(&rows, &p, MAX_HIDDEN).unwrap();
        assert!(fit(&rows, &p, MAX_HIDDEN + 1).is_err() && fit(&rows, &p, 0).is_err());
        assert!(fit(&table(MIN_ROWS - 1, 3, 4), &p[1..], 4).is_err());
        assert!(fit(&rows, &p[1..], 4).is_err());
        assert!(fit(&rows, &[1.5; MIN_ROWS], 4).is_err() && fit(&rows, &[f64::NAN; MIN_ROWS], 4).is_err());
        assert!(matches!(
            student.logits(&table(2, 4, 1)),
            Err(TfmError::Mismatch { what: "query columns", .. })
        ));
    }
}
