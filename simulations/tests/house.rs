//! The shape of the house: who may depend on whom, and which crates may see which libraries.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand, Package};

/// Our crates, and which of ours each may name.
const MAY_USE: &[(&str, &[&str])] = &[
    ("tabmesh-contract", &[]),
    ("tabmesh-privacy", &[]),
    ("tabmesh-store", &[]),
    ("tabmesh-synthesis", &["tabmesh-privacy"]),
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

fn members() -> BTreeMap<String, Package> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let metadata = MetadataCommand::new().manifest_path(manifest).no_deps().exec().unwrap();
    metadata.packages.into_iter().map(|p| (p.name.to_string(), p)).collect()
}

fn normal_dependencies(package: &Package) -> BTreeSet<String> {
    let kept = package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal);
    kept.map(|d| d.name.clone()).collect()
}

#[test]
fn every_crate_of_the_workspace_has_a_rule() {
    let ruled: BTreeSet<String> = MAY_USE.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(members().into_keys().collect::<BTreeSet<_>>(), ruled);
}

#[test]
fn dependencies_point_one_way() {
    let libraries: BTreeSet<&str> = MAY_USE.iter().take(7).map(|(name, _)| *name).collect();
    let members = members();
    for (name, allowed) in MAY_USE {
        for dependency in normal_dependencies(&members[*name]) {
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
        for dependency in normal_dependencies(&package) {
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
        let manifest = std::fs::read_to_string(&package.manifest_path).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{name} does not take the workspace lints");
    }
}
