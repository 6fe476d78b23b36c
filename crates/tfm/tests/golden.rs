//! Forward pass against the public package.
//!
//! `v2_clf_tiny.safetensors` holds random weights, made-up tables and the outputs of PyPI tabicl 2.2.0 on torch
//! 2.15.0 with mixed precision off. Tolerance 1e-4, as the file's noise floor is 1.4e-5.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use tabmesh_tfm::{Model, ModelConfig, checkpoint, model::Tables};

fn floats(container: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = container.tensor(name).unwrap().data().to_vec();
    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn logits_match_the_public_package() {
    let bytes = include_bytes!("fixtures/v2_clf_tiny.safetensors");
    let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    let config: ModelConfig = serde_json::from_str(&metadata["config"]).unwrap();
    let container = SafeTensors::deserialize(bytes).unwrap();
    let weights: BTreeMap<_, _> = container
        .tensors()
        .into_iter()
        .filter(|(name, _)| !name.starts_with("__io."))
        .map(|(name, view)| (name.clone(), (view.shape().to_vec(), floats(&container, &name))))
        .collect();
    let model: Model = checkpoint::model_from_named(&config, weights).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&metadata["cases"]).unwrap();
    let mut checked = 0;
    for case in cases {
        let size = |key: &str| usize::try_from(case[key].as_u64().unwrap()).unwrap();
        let (n, m, columns, classes) = (size("n"), size("m"), size("H"), size("K"));
        if classes > config.max_classes {
            continue;
        }
        let name = case["name"].as_str().unwrap();
        let mut labels: Vec<u8> =
            floats(&container, &format!("__io.{name}.y")).iter().map(|v| *v as u8).collect();
        labels.resize(n + m, 0);
        let values = floats(&container, &format!("__io.{name}.X"));
        let tables = Tables { tables: 1, rows: n + m, columns, context: n, values, labels, texts: None };
        let got = model.forward(&tables).unwrap();
        let expected = floats(&container, &format!("__io.{name}.decoder"));
        assert_eq!(got.len(), expected.len());
        let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst < 1e-4, "case {name}: largest difference {worst}");
        checked += 1;
    }
    assert_eq!(checked, 6);
}
