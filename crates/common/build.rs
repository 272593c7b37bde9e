//! Compiles `proto/` with a pure-Rust compiler, so that nobody has to install `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../proto");
    println!("cargo:rerun-if-changed={root}");
    let files = protox::compile(
        [
            format!("{root}/stator/worker/v1/worker.proto"),
            format!("{root}/stator/plane/v1/plane.proto"),
            format!("{root}/stator/kv/v1/kv.proto"),
            format!("{root}/stator/router/v1/router.proto"),
        ],
        [root],
    )?;
    prost_build::Config::new()
        .bytes([
            ".stator.worker.v1.GenerateRequest.prompt_tokens",
            ".stator.worker.v1.GenerateRequest.kv_transfer_params",
            ".stator.worker.v1.Delta.kv_transfer_params",
        ])
        .compile_fds(files)?;
    let etcd = protox::compile([format!("{root}/etcd/etcd.proto")], [root])?;
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .compile_fds(etcd)?;
    Ok(())
}
