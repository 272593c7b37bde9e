//! How news spreads: whoever publishes is heard by all that subscribe, and can be asked for what they missed.
//!
//! News is best effort and bounded: a subscriber that lags loses some, notices it by the numbers in the
//! messages, and asks. So each kind of news brings its own repair: for KV caches, [`Follower`] keeps exact
//! views of what a relay tells (`proto/stator/kv/v1`, rules in `proto/README.md`).
//!
//! - [`view`]: what is said about caches, read from the wire and written to it.
//! - [`plane`]: what carries it, as traits; [`zmq`] and [`nats`] are the planes there are.
//! - [`follower`]: the subscriber.

pub mod follower;
pub mod nats;
pub mod plane;
pub mod view;
pub mod zmq;

pub use follower::{Event, Events, Follower};
pub use view::{Blocks, Change, Medium, ViewId};
