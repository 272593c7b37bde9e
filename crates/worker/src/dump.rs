//! `--dump-config-to`: everything that decides what a worker does, in one file, without its secrets; and what of a
//! configuration may be shown at all.

use std::{env, fs, io, path::Path};

use serde_json::{Value, json};
use stator_common::card::Role;

use crate::config::Config;

/// Variables that change what a worker or its engine does begin with one of these.
const PREFIXES: [&str; 22] = [
    "CUDA_",
    "DYN_",
    "FLASHINFER_",
    "GLOO_",
    "HF_",
    "HIP_",
    "KVBM_",
    "LMCACHE_",
    "MOONCAKE_",
    "NCCL_",
    "NIXL_",
    "NVIDIA_",
    "OMP_",
    "PYTORCH_",
    "RAY_",
    "ROCM_",
    "STATOR_",
    "TORCH",
    "TRANSFORMERS_",
    "TRITON_",
    "UCX_",
    "VLLM_",
];

/// A name with one of these in it is a secret's.
const SECRETS: [&str; 7] = [
    "TOKEN",
    "KEY",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "CREDENTIAL",
    "AUTH",
];

const HIDDEN: &str = "<hidden>";

/// Writes the file.
///
/// # Errors
/// Those of writing it.
pub(crate) fn write(path: &Path, config: &Config, role: Role) -> io::Result<()> {
    let variables = env::vars_os().filter_map(|(name, value)| {
        Some((
            name.into_string().ok()?,
            value.to_string_lossy().into_owned(),
        ))
    });
    let mut text = serde_json::to_vec_pretty(&describe(config, role, variables))?;
    text.push(b'\n');
    fs::write(path, text)
}

/// Returns a configuration as it may be shown: vLLM's flags may have secrets for values.
pub(crate) fn shown(config: &Config) -> Config {
    Config {
        engine_args: without_secrets(&config.engine_args),
        ..config.clone()
    }
}

fn describe(
    config: &Config,
    role: Role,
    variables: impl Iterator<Item = (String, String)>,
) -> Value {
    let shown = shown(config);
    let mut environment: Vec<_> = variables
        .filter(|(name, _)| PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
        .map(|(name, value)| {
            let value = if is_secret(&name) {
                HIDDEN.into()
            } else {
                value
            };
            (name, Value::from(value))
        })
        .collect();
    environment.sort_by(|(a, _), (b, _)| a.cmp(b));
    let vllm = config.vllm.as_ref();
    let transfer = config.transfer(role).ok().flatten();
    json!({
        "stator_version": env!("CARGO_PKG_VERSION"),
        "role": role.to_string(),
        "place": config.place(role).to_string(),
        "config": serde_json::to_value(&shown).unwrap_or_default(),
        "kv_transfer_config": transfer.and_then(|transfer| {
            serde_json::from_str::<Value>(&transfer.to_json()).ok()
        }),
        "vllm_version": vllm.map(|vllm| &vllm.schema.vllm_version),
        "installed_packages": vllm.map(|vllm| &vllm.packages),
        "environment": environment.into_iter().collect::<serde_json::Map<_, _>>(),
        "system_info": {
            "os": env::consts::OS,
            "architecture": env::consts::ARCH,
            "cpus": std::thread::available_parallelism().map(usize::from).ok(),
        },
    })
}

fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_uppercase().replace('-', "_");
    SECRETS.iter().any(|part| {
        // Whole words: a tokenizer is no secret.
        name.split('_')
            .any(|word| word.strip_suffix('S').unwrap_or(word) == *part || word == *part)
    })
}

/// Hides what follows flags such as vLLM's `--api-key`.
fn without_secrets(args: &[String]) -> Vec<String> {
    let mut hide = false;
    let shown = args.iter().map(|argument| {
        if let Some(flag) = argument.strip_prefix("--") {
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (flag, None),
            };
            hide = is_secret(name) && value.is_none();
            return match value {
                Some(_) if is_secret(name) => format!("--{name}={HIDDEN}"),
                _ => argument.clone(),
            };
        }
        if hide {
            HIDDEN.to_owned()
        } else {
            argument.clone()
        }
    });
    shown.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_hidden_and_everything_else_that_counts_is_there() {
        let config = Config {
            model: "/m".to_owned(),
            engine_args: [
                "--api-key",
                "k1",
                "k2",
                "--hf-token=t",
                "--tokenizer",
                "x",
                "--max-model-len",
                "64",
            ]
            .map(String::from)
            .into(),
            plane_token: Some("s3cret".into()),
            ..Config::default()
        };
        let variables = [
            ("HF_TOKEN", "t"),
            ("VLLM_API_KEY", "k1"),
            ("DYN_NAMESPACE", "n"),
            ("HOME", "/root"),
            ("STATOR_PLANE_TOKEN", "s3cret"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let dump = describe(&config, Role::Decode, variables.into_iter());
        assert_eq!(
            dump["config"]["engine_args"],
            json!([
                "--api-key",
                HIDDEN,
                HIDDEN,
                "--hf-token=<hidden>",
                "--tokenizer",
                "x",
                "--max-model-len",
                "64",
            ])
        );
        assert_eq!(
            dump["environment"],
            json!({"DYN_NAMESPACE": "n", "HF_TOKEN": HIDDEN, "STATOR_PLANE_TOKEN": HIDDEN, "VLLM_API_KEY": HIDDEN})
        );
        assert_eq!(dump["place"], "dyn://dynamo.backend.generate");
        assert!(!dump.to_string().contains("s3cret"));
    }
}
