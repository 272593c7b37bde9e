//! The messages of `proto/`, generated at build time.

/// Requests and their outputs between a processor and a worker (`proto/stator/worker/v1`).
pub mod worker {
    #![allow(clippy::all, missing_docs, unreachable_pub)]
    include!(concat!(env!("OUT_DIR"), "/stator.worker.v1.rs"));
}

/// All of it, encoded, for whoever asks a gRPC server what it can do.
pub(crate) const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stator.bin"));

/// How the ends of a tcp plane connection introduce themselves (`proto/stator/plane/v1`).
pub mod plane {
    #![allow(clippy::all, missing_docs, unreachable_pub)]
    include!(concat!(env!("OUT_DIR"), "/stator.plane.v1.rs"));
}

/// What relays tell of KV caches (`proto/stator/kv/v1`).
pub mod kv {
    #![allow(clippy::all, missing_docs, unreachable_pub)]
    include!(concat!(env!("OUT_DIR"), "/stator.kv.v1.rs"));
}

/// The part of etcd's API that discovery uses (`proto/etcd`).
pub(crate) mod etcd {
    #![allow(clippy::all, missing_docs, unreachable_pub)]
    include!(concat!(env!("OUT_DIR"), "/etcdserverpb.rs"));
}
