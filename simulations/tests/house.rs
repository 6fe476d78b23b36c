//! The shape of the house: who may depend on whom, and which crates may see which libraries.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Our crates, and which of ours each may name.
const MAY_USE: &[(&str, &[&str])] = &[
    ("tabmesh-contract", &[]),
    ("tabmesh-privacy", &[]),
    ("tabmesh-store", &[]),
    ("tabmesh-synthesis", &["tabmesh-privacy"]),
    ("tabmesh-forest", &["tabmesh-contract", "tabmesh-privacy"]),
    ("tabmesh-tfm", &["tabmesh-contract", "tabmesh-privacy"]),
    ("tabmesh-federation", &["tabmesh-contract", "tabmesh-privacy"]),
    ("tabmesh-proto", &["tabmesh-contract", "tabmesh-privacy", "tabmesh-federation"]),
    ("tabmesh-coordinator", &[LIBRARIES]),
    ("tabmesh-agent", &[LIBRARIES]),
    ("tabmesh-sim", &[LIBRARIES, "tabmesh-coordinator", "tabmesh-agent"]),
];

/// Stands for every library crate of the workspace.
const LIBRARIES: &str = "*";

/// Libraries that only some crates may name, each because it owns that concern.
const CONFINED: &[(&str, &[&str])] = &[
    ("candle-core", &["tabmesh-tfm"]),
    ("candle-nn", &["tabmesh-tfm"]),
    ("zip", &["tabmesh-tfm"]),
    ("sled", &["tabmesh-store"]),
    ("opendp", &["tabmesh-privacy"]),
    ("forust-ml", &["tabmesh-agent"]),
    ("regorus", &["tabmesh-contract"]),
    ("tonic", &["tabmesh-proto", "tabmesh-coordinator", "tabmesh-agent", "tabmesh-sim"]),
    ("rustls", &["tabmesh-proto", "tabmesh-agent", "tabmesh-sim"]),
    ("tokio", &["tabmesh-proto", "tabmesh-coordinator", "tabmesh-agent", "tabmesh-sim"]),
    ("arrow-array", &["tabmesh-agent", "tabmesh-sim"]),
    ("parquet", &["tabmesh-agent", "tabmesh-sim"]),
];

/// A crate of the workspace, as cargo describes it.
struct Package {
    manifest: String,
    /// What the crate itself is built with, not its tests or its build script.
    dependencies: BTreeSet<String>,
}

// Read as plain JSON: a library for it would ask more features of `serde_json`, and with them everything in the house would be
// built once more for the tests than for the quickstart.
fn members() -> BTreeMap<String, Package> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let cargo = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--manifest-path", manifest])
        .output()
        .unwrap();
    assert!(cargo.status.success(), "{}", String::from_utf8_lossy(&cargo.stderr));
    let metadata: Value = serde_json::from_slice(&cargo.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let package = |package: &Value| {
        let kept = package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"].is_null());
        let dependencies = kept.map(|d| text(&d["name"])).collect();
        (text(&package["name"]), Package { manifest: text(&package["manifest_path"]), dependencies })
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

#[test]
fn every_crate_of_the_workspace_has_a_rule() {
    let ruled: BTreeSet<String> = MAY_USE.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(members().into_keys().collect::<BTreeSet<_>>(), ruled);
}

#[test]
fn dependencies_point_one_way() {
    let libraries: BTreeSet<&str> = MAY_USE.iter().take(8).map(|(name, _)| *name).collect();
    let members = members();
    for (name, allowed) in MAY_USE {
        for dependency in &members[*name].dependencies {
            if !dependency.starts_with("tabmesh-") {
                continue;
            }
            let by_name = allowed.contains(&dependency.as_str());
            let by_kind = allowed.contains(&LIBRARIES) && libraries.contains(dependency.as_str());
            assert!(by_name || by_kind, "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn confined_libraries_stay_where_they_belong() {
    for (name, package) in members() {
        for dependency in &package.dependencies {
            let Some((_, owners)) = CONFINED.iter().find(|(library, _)| *library == dependency) else {
                continue;
            };
            assert!(
                owners.contains(&name.as_str()),
                "{name} must not name {dependency}; only {owners:?} may"
            );
        }
    }
}

#[test]
fn no_crate_holds_unsafe_code() {
    let lints = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml")).unwrap();
    assert!(lints.contains("unsafe_code = \"forbid\""));
    for (name, package) in members() {
        let manifest = std::fs::read_to_string(&package.manifest).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{name} does not take the workspace lints");
    }
}
