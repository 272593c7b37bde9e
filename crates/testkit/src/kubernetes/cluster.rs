//! The pods, their versions, and what changed.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
};

use serde_json::Value;
use tokio::sync::watch;

/// Bytes of all annotations of an object together, at most (Kubernetes, `TotalAnnotationSizeLimitB`).
const ANNOTATIONS_LIMIT: usize = 256 * 1024;

/// A pod as a 1.33 cluster shows it.
pub(super) fn golden() -> Value {
    serde_json::from_str(include_str!("../../golden/kubernetes/pod.json")).expect("JSON")
}

/// What a cluster knows of pods.
pub(super) struct Cluster {
    state: Mutex<State>,
    /// Counts what watches have to look at.
    signal: watch::Sender<u64>,
}

struct State {
    pods: BTreeMap<String, Value>,
    version: u64,
    /// Of [`State::changes`], what is before the first.
    forgotten: u64,
    changes: Vec<Change>,
    forbidden: Vec<String>,
    /// Watches that began before this many were ended are over.
    ended: u64,
    writes: u64,
    lists: u64,
}

/// What became of a pod.
#[derive(Clone)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) before: Option<Value>,
    pub(super) after: Option<Value>,
}

/// Why something is not done, as the API server says it.
pub(super) struct Refusal {
    pub(super) code: u16,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                pods: BTreeMap::new(),
                version: 1000,
                forgotten: 1000,
                changes: Vec::new(),
                forbidden: Vec::new(),
                ended: 0,
                writes: 0,
                lists: 0,
            }),
            signal: watch::Sender::new(0),
        }
    }
}

impl Cluster {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while locked")
    }

    fn tell(&self) {
        self.signal.send_modify(|count| *count += 1);
    }

    pub(super) fn signal(&self) -> watch::Receiver<u64> {
        self.signal.subscribe()
    }

    pub(super) fn version(&self) -> u64 {
        self.state().version
    }

    pub(super) fn pod(&self, name: &str) -> Option<Value> {
        self.state().pods.get(name).cloned()
    }

    /// Returns all pods, and the version of that.
    pub(super) fn list(&self) -> (Vec<Value>, u64) {
        let mut state = self.state();
        state.lists += 1;
        (state.pods.values().cloned().collect(), state.version)
    }

    /// Puts a pod in place of what is there.
    pub(super) fn change(&self, name: &str, change: impl FnOnce(Option<&Value>) -> Option<Value>) {
        let mut state = self.state();
        let before = state.pods.get(name).cloned();
        let mut after = change(before.as_ref());
        state.version += 1;
        let version = state.version;
        if let Some(pod) = &mut after {
            pod["metadata"]["resourceVersion"] = version.to_string().into();
            state.pods.insert(name.to_owned(), pod.clone());
        } else {
            state.pods.remove(name);
        }
        state.changes.push(Change {
            version,
            before,
            after,
        });
        drop(state);
        self.tell();
    }

    /// Merges a patch into a pod (RFC 7396), or says what would come of it.
    pub(super) fn patch(&self, name: &str, patch: &Value, dry: bool) -> Result<Value, Refusal> {
        let before = self.pod(name).ok_or_else(|| Refusal {
            code: 404,
            reason: "NotFound",
            message: format!("pods \"{name}\" not found"),
        })?;
        let asked = |field: &str| patch["metadata"][field].as_str().map(str::to_owned);
        if asked("resourceVersion")
            .is_some_and(|asked| before["metadata"]["resourceVersion"] != asked)
        {
            return Err(Refusal {
                code: 409,
                reason: "Conflict",
                message: format!(
                    "Operation cannot be fulfilled on pods \"{name}\": the object has been modified; please apply \
                     your changes to the latest version and try again"
                ),
            });
        }
        let invalid = |what: &str| Refusal {
            code: 422,
            reason: "Invalid",
            message: format!("Pod \"{name}\" is invalid: {what}"),
        };
        if asked("uid").is_some_and(|asked| before["metadata"]["uid"] != asked) {
            return Err(invalid("metadata.uid: Invalid value: field is immutable"));
        }
        let mut after = before.clone();
        merge(&mut after, patch);
        let annotations = after["metadata"]["annotations"].as_object();
        let bytes = annotations.into_iter().flatten();
        let bytes: usize = bytes
            .map(|(name, value)| name.len() + value.as_str().map_or(0, str::len))
            .sum();
        if bytes > ANNOTATIONS_LIMIT {
            return Err(invalid(&format!(
                "metadata.annotations: Too long: may not be more than {ANNOTATIONS_LIMIT} bytes"
            )));
        }
        if dry {
            return Ok(after);
        }
        self.state().writes += 1;
        // Nothing is written where nothing changes.
        if after != before {
            self.change(name, |_| Some(after));
        }
        Ok(self.pod(name).expect("it is there"))
    }

    pub(super) fn forbid(&self, verbs: &[&str]) {
        self.state().forbidden = verbs.iter().map(|verb| (*verb).to_owned()).collect();
    }

    pub(super) fn is_forbidden(&self, verb: &str) -> bool {
        self.state()
            .forbidden
            .iter()
            .any(|forbidden| forbidden == verb)
    }

    pub(super) fn end_watches(&self) {
        self.state().ended += 1;
        self.tell();
    }

    /// Returns how many times all watches were ended.
    pub(super) fn ended(&self) -> u64 {
        self.state().ended
    }

    pub(super) fn forget(&self) {
        let mut state = self.state();
        // Something else in the cluster changed since, or the latest version would still be known.
        state.version += 1;
        state.forgotten = state.version;
        state.changes.clear();
        drop(state);
        self.end_watches();
    }

    /// Returns what came after a version; absent if that is not known any more, with what is.
    pub(super) fn after(&self, version: u64) -> Result<Vec<Change>, u64> {
        let state = self.state();
        if version < state.forgotten {
            return Err(state.forgotten);
        }
        let later = state
            .changes
            .iter()
            .filter(|change| change.version > version);
        Ok(later.cloned().collect())
    }

    pub(super) fn writes(&self) -> u64 {
        self.state().writes
    }

    pub(super) fn lists(&self) -> u64 {
        self.state().lists
    }
}

fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let target = target.as_object_mut().expect("an object");
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}
