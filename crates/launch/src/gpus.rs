//! Which GPUs there are, and which worker computes with which.
//!
//! Workers that are not told which to use would all take the first ones. A machine without GPUs, or with ones that
//! cannot be counted, leaves every worker what it sees.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::process::Command;

const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";
/// `nvidia-smi` takes a second or two where the driver is not kept loaded, and forever where it is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// The GPUs that nobody has.
#[derive(Debug, Default)]
pub(crate) struct Gpus {
    /// In the order in which they were found.
    all: Vec<String>,
    taken: Vec<String>,
    /// Whether `nvidia-smi` numbered them.
    in_bus_order: bool,
}

impl Gpus {
    /// Finds those of this machine: those that `CUDA_VISIBLE_DEVICES` names, else all that `nvidia-smi` lists.
    pub(crate) async fn find() -> Gpus {
        if let Ok(list) = std::env::var(VISIBLE) {
            return Gpus::of(listed(&list));
        }
        let mut command = Command::new("nvidia-smi");
        command
            .args(["--query-gpu=index", "--format=csv,noheader"])
            .stdin(Stdio::null())
            .kill_on_drop(true);
        match tokio::time::timeout(PATIENCE, command.output()).await {
            Ok(Ok(output)) if output.status.success() => {
                let text = String::from_utf8_lossy(&output.stdout);
                let all = text.lines().map(|line| line.trim().to_owned()).collect();
                Gpus {
                    in_bus_order: true,
                    ..Gpus::of(all)
                }
            }
            // Not installed, without a driver, or stuck: as if there were none.
            Ok(Ok(_) | Err(_)) | Err(_) => Gpus::default(),
        }
    }

    fn of(all: Vec<String>) -> Gpus {
        Gpus {
            all: all.into_iter().filter(|gpu| !gpu.is_empty()).collect(),
            ..Gpus::default()
        }
    }

    /// Says whether their numbers are those of the bus, which CUDA must be told.
    pub(crate) fn in_bus_order(&self) -> bool {
        self.in_bus_order
    }

    /// Returns how many there are, whoever has them.
    pub(crate) fn count(&self) -> usize {
        self.all.len()
    }

    /// Fails when workers that need so many, each, cannot all have theirs.
    pub(crate) fn enough_for(&self, needs: &[(String, usize)]) -> Result<()> {
        if self.all.is_empty() {
            return Ok(());
        }
        let needed: usize = needs.iter().map(|(_, each)| each).sum();
        let free = self.all.len() - self.taken.len();
        let each: Vec<String> = needs
            .iter()
            .map(|(name, each)| format!("{name}: {each}"))
            .collect();
        ensure!(
            needed <= free,
            "{needed} GPUs are needed ({}), and of {} ({}) {free} are free; start fewer or narrower workers, or let \
             them share with --share-gpus and vLLM's --gpu-memory-utilization",
            each.join(", "),
            self.all.len(),
            self.all.join(",")
        );
        Ok(())
    }

    /// Takes the first `n` that are free; none where there are no GPUs at all.
    ///
    /// # Errors
    /// As [`Gpus::enough_for`].
    pub(crate) fn take(&mut self, name: &str, n: usize) -> Result<Vec<String>> {
        self.enough_for(&[(name.to_owned(), n)])?;
        let free = self.all.iter().filter(|gpu| !self.taken.contains(gpu));
        let given: Vec<String> = free.take(n).cloned().collect();
        self.taken.extend_from_slice(&given);
        Ok(given)
    }

    /// Takes back what a worker had.
    pub(crate) fn give_back(&mut self, gpus: &[String]) {
        self.taken.retain(|gpu| !gpus.contains(gpu));
    }
}

/// Reads `CUDA_VISIBLE_DEVICES` as CUDA does: what follows the first that is not one is not seen.
fn listed(list: &str) -> Vec<String> {
    list.split(',')
        .map(str::trim)
        .take_while(|gpu| !gpu.is_empty() && *gpu != "-1")
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_has_one_owner_until_it_is_given_back() {
        let mut gpus = Gpus::of(listed("4,5,6"));
        assert_eq!(gpus.take("a", 2).unwrap(), ["4", "5"]);
        let error = gpus.take("b", 2).unwrap_err().to_string();
        assert!(error.contains("1 are free"), "{error}");
        gpus.give_back(&["4".into()]);
        assert_eq!(gpus.take("b", 2).unwrap(), ["4", "6"]);
    }

    #[test]
    fn without_gpus_nobody_gets_any_and_nobody_lacks_any() {
        let mut gpus = Gpus::of(listed("-1"));
        assert_eq!(gpus.count(), 0);
        assert!(gpus.take("a", 8).unwrap().is_empty());
    }

    #[test]
    fn too_few_is_said_with_who_needs_how_many() {
        let gpus = Gpus::of(listed("0,GPU-1"));
        let needs = [("prefill-0".to_owned(), 1), ("decode-0".to_owned(), 4)];
        let error = gpus.enough_for(&needs).unwrap_err().to_string();
        assert!(
            error.starts_with("5 GPUs are needed (prefill-0: 1, decode-0: 4)"),
            "{error}"
        );
        assert!(error.contains("--share-gpus"), "{error}");
    }

    #[test]
    fn what_follows_no_device_is_not_seen() {
        assert_eq!(listed("1, 0,-1,2"), ["1", "0"]);
        assert!(listed("").is_empty());
    }
}
