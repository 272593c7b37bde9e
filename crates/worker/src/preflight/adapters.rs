//! Whether an engine keeps all the adapters that it is to serve. What makes one unusable is refused before.

use stator_engine::flags::Given;

use super::Finding;
use crate::config::Config;

const ABOUT: &str = "adapters";

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let given = Given::read(&config.engine_args);
    let served = given.values("lora-modules").count();
    if served == 0 {
        return Vec::new();
    }
    // Defaults of vLLM (0.32, config/lora.py).
    let count = |name| given.value(name).and_then(|count| count.parse().ok());
    let at_once = count("max-loras").unwrap_or(1);
    let kept = count("max-cpu-loras").unwrap_or(at_once);
    vec![if served <= kept {
        let found = format!("{served} LoRA adapters, at most {at_once} in one step");
        Finding::fine(ABOUT, found)
    } else {
        Finding::warning(
            ABOUT,
            format!(
                "of {served} LoRA adapters the engine keeps {kept}: it reads the others again whenever they are asked for"
            ),
            format!("--max-cpu-loras {served}, and --max-loras for how many run in one step"),
        )
    }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Severity;

    #[test]
    fn adapters_that_do_not_fit_the_engines_memory_are_warned_of() {
        let severity = |flags: &str| {
            let flags = format!("--enable-lora --lora-modules a=/a b=/b {flags}");
            let config = Config {
                engine_args: flags.split_whitespace().map(str::to_owned).collect(),
                ..Config::default()
            };
            examine(&config)[0].severity
        };
        assert_eq!(severity(""), Severity::Warning);
        assert_eq!(severity("--max-loras 2"), Severity::Fine);
        assert_eq!(severity("--max-cpu-loras 2"), Severity::Fine);
        assert!(examine(&Config::default()).is_empty());
    }
}
