//! What stands around the thing under test, written once: the worker behind a processor, the
//! processor in front of a worker, the HTTP client, the model, the processes, a real vLLM
//! a real etcd and a real NATS server, and an API server of Kubernetes, played.
//!
//! Each module answers one question: [`mod@card`] what a worker says of itself, [`client`] what a processor asks of a worker, [`etcd`] a real one to
//! register in, [`http`] what a
//! client sees on the wire, [`kubernetes`] what pods there are, [`model`] what is served, [`nats`] a real one to talk by, [`ports`] where something can listen,
//! [`process`] what runs and how it is ended, [`relay`] who tells what caches hold, [`vllm`] where a real engine is found and how it is
//! started by hand, [`wait`] when something holds, [`worker`] what a processor meets.
//!
//! It deliberately does not start what is under test: a test of the processor starts the processor
//! itself. So it depends on `common` alone, and the integration tests of every crate above may use it
//! without seeing their own crate twice. The unit tests of `common` may not, for that reason.
//! It decides nothing either: what must hold stands in the test. Everything here panics where a test
//! would; production code never depends on it.

pub mod card;
pub mod client;
pub mod etcd;
pub mod http;
pub mod kubernetes;
pub mod model;
pub mod nats;
pub mod ports;
pub mod process;
pub mod relay;
pub mod vllm;
pub mod wait;
pub mod worker;
