//! What vLLM's log says about the progress of a start, and about the cause of an end.
//!
//! The log is for people and changes between versions, so this only decorates [`crate::State`]:
//! nothing waits for it.

use crate::state::Phase;

/// Returns the phase that a log line announces, if it announces one.
///
/// Lines as of vLLM 0.32 and 0.33, with and without the `(EngineCore pid=..)` prefix.
pub(crate) fn phase(line: &str) -> Option<Phase> {
    if line.contains("checkpoint shards:") {
        let percent = percent(line.split("checkpoint shards:").nth(1)?)?;
        return Some(Phase::LoadingWeights { percent });
    }
    const MARKS: [(&str, Phase); 8] = [
        ("Initializing a V1 LLM engine", Phase::Initializing),
        (
            "Starting to load model",
            Phase::LoadingWeights { percent: 0 },
        ),
        (
            "Loading weights took",
            Phase::LoadingWeights { percent: 100 },
        ),
        ("Dynamo bytecode transform", Phase::Compiling),
        ("Compiling a graph", Phase::Compiling),
        ("Capturing CUDA graph", Phase::Compiling),
        ("torch.compile takes", Phase::WarmingUp),
        ("KV cache size:", Phase::WarmingUp),
    ];
    MARKS
        .into_iter()
        .find(|(mark, _)| line.contains(mark))
        .map(|(_, phase)| phase)
}

/// Says whether a line names the cause of a failure: the last line of a Python traceback, or the
/// argument parser's complaint.
pub(crate) fn is_cause(line: &str) -> bool {
    let text = line
        .rsplit_once("] ")
        .map_or(line, |(_, text)| text)
        .trim_start();
    let name = text.split([':', ' ']).next().unwrap_or_default();
    let class = name.rsplit('.').next().unwrap_or_default();
    let raised = class.starts_with(|c: char| c.is_ascii_uppercase())
        && (class.ends_with("Error") || class.ends_with("Exception"))
        && text.len() > name.len();
    raised || text.contains(": error: ")
}

/// Reads `"  42% Completed"`.
fn percent(text: &str) -> Option<u8> {
    let number = text.trim_start().split('%').next()?;
    number.parse().ok().filter(|percent| *percent <= 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_start_are_phases() {
        let shards = "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<?, ?it/s]";
        assert_eq!(phase(shards), Some(Phase::LoadingWeights { percent: 50 }));
        let core = "(EngineCore pid=7) INFO 11-21 23:43:13 [kv_cache_utils.py:2327] CPU KV cache size: 65,536 tokens";
        assert_eq!(phase(core), Some(Phase::WarmingUp));
        assert_eq!(phase("INFO something else"), None);
        assert_eq!(phase("Loading safetensors checkpoint shards: what"), None);
    }

    #[test]
    fn a_raised_exception_and_a_refused_flag_are_causes() {
        assert!(is_cause("ValueError: max_model_len is too large"));
        assert!(is_cause(
            "(EngineCore pid=7) ERROR 11-21 [core.py:1] torch.OutOfMemoryError: CUDA out of memory"
        ));
        assert!(is_cause(
            "vllm serve: error: unrecognized arguments: --nope"
        ));
        assert!(!is_cause("INFO 11-21 [x.py:1] Errors will be logged"));
        assert!(!is_cause(
            "ERROR 11-21 [core.py:1] Traceback (most recent call last):"
        ));
    }
}
