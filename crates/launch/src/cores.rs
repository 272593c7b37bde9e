//! How engines without a GPU share the cores of one machine.
//!
//! vLLM binds the threads of every engine that it starts on a CPU to the same cores, those of the first NUMA node. Two
//! such engines wait for each other, and the threads with which NIXL moves KV wait with them: a hand-off takes longer
//! than its lease. So where there are several, their threads are bound to nothing and are no more than there are cores.
//! A single engine is left to vLLM (but for one with NIXL, which its worker has unbound), and so is whatever the
//! environment says already.

use std::ffi::OsString;

use crate::gpus::Gpus;

/// `auto` (vLLM's default), `nobind`, or lists of cores (`vllm/utils/ompmultiprocessing.py`).
const BINDING: &str = "VLLM_CPU_OMP_THREADS_BIND";
/// What OpenMP reads, where vLLM binds nothing.
const THREADS: &str = "OMP_NUM_THREADS";

/// Returns what the environment of each worker needs.
///
/// - `processes`: those that compute, of all workers of this machine.
pub(crate) fn environment(gpus: &Gpus, processes: usize) -> Vec<(&'static str, OsString)> {
    if gpus.count() > 0 {
        return Vec::new();
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    shared(processes, cores, |name| std::env::var_os(name).is_some())
}

fn shared(
    processes: usize,
    cores: usize,
    is_said: impl Fn(&str) -> bool,
) -> Vec<(&'static str, OsString)> {
    if processes < 2 || is_said(BINDING) {
        return Vec::new();
    }
    let mut environment = vec![(BINDING, "nobind".into())];
    if !is_said(THREADS) {
        let threads = (cores / processes).max(1);
        environment.push((THREADS, threads.to_string().into()));
    }
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_engines_divide_the_cores_and_are_bound_to_none() {
        let said = shared(3, 8, |_| false);
        assert_eq!(said, [(BINDING, "nobind".into()), (THREADS, "2".into())]);
        let crowded = shared(3, 2, |_| false);
        assert_eq!(crowded[1], (THREADS, "1".into()));
    }

    #[test]
    fn a_single_engine_and_what_is_said_already_are_left_alone() {
        assert!(shared(1, 8, |_| false).is_empty());
        assert!(shared(2, 8, |name| name == BINDING).is_empty());
        let threads_said = shared(2, 8, |name| name == THREADS);
        assert_eq!(threads_said, [(BINDING, "nobind".into())]);
    }
}
