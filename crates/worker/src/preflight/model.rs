//! Whether the model is there and can be spread as the flags say.

use stator_engine::{flags::Given, model};

use super::Finding;
use crate::{cli::EngineKind, config::Config, launch::size};

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let Some(folder) = model::folder(&config.model) else {
        let found = format!("the files of '{}' are not on this machine", config.model);
        let remedy = "name the model's folder, or fetch it into the Hugging Face cache: the worker serves the \
                      tokenizer from there";
        // Names in the Hugging Face hub begin with a letter or a digit.
        let is_path = config.model.starts_with(['.', '/', '~']);
        return vec![match config.engine_kind() {
            // The engine fetches it.
            EngineKind::Vllm if !is_path => Finding::warning("model", found, remedy),
            EngineKind::Vllm | EngineKind::Sim | EngineKind::Attach => {
                Finding::error("model", found, remedy)
            }
        }];
    };
    let tensor = size(&Given::read(&config.engine_args), "tensor-parallel-size");
    let Some(heads) = model::attention_heads(&folder) else {
        return vec![Finding::fine("model", folder.display().to_string())];
    };
    vec![if heads.is_multiple_of(tensor) {
        Finding::fine(
            "model",
            format!("{}, {heads} attention heads", folder.display()),
        )
    } else {
        let fitting: Vec<String> = (1..=heads.min(64))
            .filter(|size| heads.is_multiple_of(*size))
            .map(|size| size.to_string())
            .collect();
        Finding::error(
            "model",
            format!("its {heads} attention heads cannot be spread over {tensor} devices"),
            format!("--tensor-parallel-size one of {}", fitting.join(", ")),
        )
    }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Severity;

    #[test]
    fn heads_that_cannot_be_spread_are_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let json = r#"{"text_config": {"num_attention_heads": 12}}"#;
        std::fs::write(folder.path().join("config.json"), json).unwrap();
        let severity = |size: &str| {
            let config = Config {
                model: folder.path().display().to_string(),
                engine_args: vec!["-tp".to_owned(), size.to_owned()],
                ..Config::default()
            };
            examine(&config)[0].severity
        };
        assert_eq!(
            (severity("4"), severity("8")),
            (Severity::Fine, Severity::Error)
        );
    }
}
