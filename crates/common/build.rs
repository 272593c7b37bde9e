//! Compiles `proto/` with a pure-Rust compiler, so that nobody has to install `protoc`.

use std::{env, fs, path::Path};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Of this build, not of the one that compiled this program: checkouts may share what was built.
    let root = format!("{}/../../proto", env::var("CARGO_MANIFEST_DIR")?);
    println!("cargo:rerun-if-changed={root}");
    let mut compiler = protox::Compiler::new([&root])?;
    compiler.include_imports(true).open_files([
        "stator/worker/v1/worker.proto",
        "stator/worker/v1/service.proto",
        "stator/plane/v1/plane.proto",
        "stator/kv/v1/kv.proto",
        "stator/router/v1/router.proto",
    ])?;
    // What the reflection service shows.
    let shown = Path::new(&env::var("OUT_DIR")?).join("stator.bin");
    fs::write(shown, compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".stator.worker.v1.GenerateRequest.prompt_tokens")
        .bytes(".stator.worker.v1.GenerateRequest.kv_transfer_params")
        .bytes(".stator.worker.v1.Delta.kv_transfer_params")
        .bytes(".stator.worker.v1.BlobPart.bytes")
        .compile_fds(compiler.file_descriptor_set())?;
    let etcd = protox::compile([format!("{root}/etcd/etcd.proto")], [&root])?;
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .compile_fds(etcd)?;
    Ok(())
}
