//! What an adapter's files hold, and that an engine has loaded these and no others.
//!
//! An engine names an adapter by an id, a name and a path: of files that were replaced in place it knows nothing, and
//! keeps the weights and the KV blocks of those that it read. Whether weights fit the model is for the engine to say.

use std::{fs::File, io, path::Path};

use serde::{Deserialize, Serialize};
use stator_common::BlobHash;
use tokio::task;

use crate::{error::StartError, request::Lora};

/// The file that makes a folder an adapter's.
pub const CONFIG: &str = "adapter_config.json";

/// Where the weights are, whichever there is (vLLM 0.32, lora/lora_model.py).
pub const WEIGHTS: [&str; 3] = [
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
];

/// An adapter, and what its files held when somebody looked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// As engines know it.
    pub lora: Lora,
    /// blake3 over its files.
    pub hash: BlobHash,
}

impl Adapter {
    /// Reads all of an adapter's files. They may be large; files that are missing count as such.
    ///
    /// # Errors
    /// Those of reading.
    pub fn read(lora: Lora) -> io::Result<Self> {
        let hash = hash(Path::new(&lora.path))?;
        Ok(Self { lora, hash })
    }

    /// Looks whether the files are still those that were read, on a thread of its own.
    ///
    /// # Errors
    /// [`StartError::AdapterChanged`] if not, [`StartError::AdapterFiles`] if they cannot be read.
    pub(crate) async fn check(&self) -> Result<(), StartError> {
        let path = self.lora.path.clone();
        let read = task::spawn_blocking(move || hash(Path::new(&path))).await;
        match read.expect("reading files does not panic") {
            Ok(hash) if hash == self.hash => Ok(()),
            Ok(_) => Err(StartError::AdapterChanged {
                name: self.lora.name.clone(),
                path: self.lora.path.clone(),
            }),
            Err(source) => Err(StartError::AdapterFiles {
                name: self.lora.name.clone(),
                path: self.lora.path.clone(),
                source,
            }),
        }
    }
}

fn hash(folder: &Path) -> io::Result<BlobHash> {
    let mut all = String::new();
    for name in [CONFIG].into_iter().chain(WEIGHTS) {
        match File::open(folder.join(name)) {
            Ok(file) => all += &BlobHash::of_reader(file)?.0,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(BlobHash::of(all.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn adapter(weights: &str) -> (tempfile::TempDir, Adapter) {
        let folder = tempfile::tempdir().expect("temporary folder");
        fs::write(folder.path().join(CONFIG), "{\"r\": 8}").expect("write");
        fs::write(folder.path().join(WEIGHTS[0]), weights).expect("write");
        let lora = Lora {
            name: "x".to_owned(),
            id: 7,
            path: folder.path().display().to_string(),
        };
        (folder, Adapter::read(lora).expect("readable"))
    }

    #[test]
    fn adapters_are_the_same_if_their_files_are() {
        let [(_one, one), (_same, same), (_other, other)] = ["a", "a", "b"].map(adapter);
        assert_eq!(one.hash, same.hash);
        assert_ne!(one.hash, other.hash);
    }

    #[tokio::test]
    async fn files_that_were_replaced_are_noticed() {
        let (folder, adapter) = adapter("a");
        adapter.check().await.expect("the same");
        fs::write(folder.path().join(WEIGHTS[0]), "b").expect("write");
        let error = adapter.check().await.expect_err("changed");
        assert!(matches!(error, StartError::AdapterChanged { .. }));
        assert!(error.to_string().contains("`x`"), "{error}");
    }
}
