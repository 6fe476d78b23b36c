//! Compiles the protobuf files without `protoc` and lists every RPC, so that the access table can be checked against
//! the services and none is forgotten.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 4] = [
    "tabmesh/v1/common.proto",
    "tabmesh/v1/mesh.proto",
    "tabmesh/v1/operator.proto",
    "tabmesh/v1/auditor.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let mut methods = String::from("/// Every RPC of every service, as HTTP/2 paths.\n");
    methods.push_str("pub const METHODS: &[&str] = &[\n");
    for file in &descriptors.file {
        for service in &file.service {
            for method in &service.method {
                let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                methods.push_str(&format!("    {path:?},\n"));
            }
        }
    }
    methods.push_str("];\n");
    // Cargo sets OUT_DIR for every build script.
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("methods.rs"), methods)?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
