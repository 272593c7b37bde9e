//! The command line: vLLM's own for a headless engine, and `--sim-*` for what only a simulation has.
//!
//! clap is not used because vLLM's flags are not ours to list: those that mean nothing here are
//! accepted and logged, whatever they are.

mod flags;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tracing::info;

use crate::config::{Config, Connector, Faults, KvEvents, ModelError, ModelFolder, Timing};
use crate::scheduler::Limits;
use crate::wire::WireVersion;
use flags::Flags;

/// Blocks of an engine that is not told how many it has.
const DEFAULT_BLOCKS: usize = 16_384;

pub const HELP: &str = "\
A simulated vLLM engine.

Usage: stator-sim serve MODEL --headless [vLLM flags] [--sim-*]

MODEL is a folder with config.json (and, to choose only tokens that have a text, tokenizer.json).

vLLM flags that change something: --data-parallel-address --data-parallel-rpc-port
  --data-parallel-size-local --data-parallel-start-rank --max-model-len --max-num-seqs
  --max-num-batched-tokens --block-size --num-gpu-blocks-override --[no-]enable-prefix-caching
  --kv-events-config --kv-transfer-config --scheduling-policy --enable-lora --max-loras
  --enable-sleep-mode --disable-log-stats. All others are accepted and ignored.

Pace:
  --sim-speedup X                everything takes X times less; 0: no time at all [1]
  --sim-prefill-us-per-token N   [20]
  --sim-decode-us-per-step N     [5000]
  --sim-decode-us-per-seq N      [20]
  --sim-transfer-us-per-token N  fetching KV from another engine [1]
  --sim-load-ms N                from start to ready [0]
Content:
  --sim-eos-one-in N             one in N tokens is EOS where the request names one; 0: none [0]
Wire:
  --sim-wire-version V           0.27, 0.32 or 0.33 [0.33]
  --sim-wire-extra N             unknown fields appended to outputs [0]
KV connector:
  --sim-kv-lease-ms N            how long blocks are kept for another engine [30000]
  --sim-kv-failure-ms N          how long a failed fetch takes [5000]
Faults:
  --sim-fail-to-load             ends instead of becoming ready
  --sim-die-after-steps N        says ENGINE_CORE_DEAD and ends
  --sim-vanish-after-steps N     ends without a word
  --sim-hang-after-steps N       lives on and does nothing
  --sim-deaf-after-adds N        hears nothing any more
";

/// Why a command line is refused.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("expected: stator-sim serve MODEL --headless ..; --help says more")]
    Usage,
    #[error("{flag} {value}: {reason}")]
    Value {
        flag: String,
        value: String,
        reason: String,
    },
    #[error("{0} needs a value")]
    NoValue(String),
    #[error("unknown flag {0}; --help lists those of the simulation")]
    Unknown(String),
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Reads a command line, without the program's name. One configuration per local engine; `None`
/// where help was asked for.
///
/// # Errors
/// [`CliError`].
pub fn parse(args: impl Iterator<Item = String>) -> Result<Option<Vec<Config>>, CliError> {
    let (words, mut flags) = Flags::parse(args)?;
    if flags.switch("--help") || words.first().is_some_and(|word| word == "-h") {
        return Ok(None);
    }
    let model = flags.text("--model")?;
    let folder = match (words.first().map(String::as_str), words.get(1), model) {
        (Some("serve"), Some(model), None) => PathBuf::from(model),
        (Some("serve"), None, Some(model)) => PathBuf::from(model),
        _ => return Err(CliError::Usage),
    };
    if !flags.switch("--headless") {
        return Err(CliError::Usage);
    }
    let mut folder = ModelFolder::read(&folder)?;
    let host = flags.text("--data-parallel-address")?;
    let host = host.unwrap_or_else(|| "127.0.0.1".into());
    let port: u16 = flags.get("--data-parallel-rpc-port")?.unwrap_or(29_550);
    let engines: u32 = flags.get("--data-parallel-size-local")?.unwrap_or(1);
    let first_rank: u32 = flags.get("--data-parallel-start-rank")?.unwrap_or(0);
    folder.model.eos_one_in = flags.get("--sim-eos-one-in")?.unwrap_or(0);

    let connector = connector(&mut flags)?;
    let kv_events = kv_events(&mut flags)?;
    let limits = limits(&mut flags, &folder, connector.as_ref(), kv_events.is_some())?;
    let config = Config {
        handshake: format!("tcp://{host}:{port}"),
        dp_rank: first_rank,
        wire: flags
            .get::<WireVersion>("--sim-wire-version")?
            .unwrap_or_default(),
        extra_fields: flags.get("--sim-wire-extra")?.unwrap_or(0),
        limits,
        model: folder.model,
        timing: timing(&mut flags)?,
        kv_events,
        connector: connector.map(|(connector, _)| connector),
        max_loras: match (flags.switch("--enable-lora"), flags.count("--max-loras")?) {
            (true, max) => max.unwrap_or(1),
            (false, _) => 0,
        },
        sleep_mode: flags.switch("--enable-sleep-mode"),
        log_stats: !flags.switch("--disable-log-stats"),
        faults: Faults {
            fail_to_load: flags.switch("--sim-fail-to-load"),
            die_after_steps: flags.get("--sim-die-after-steps")?,
            vanish_after_steps: flags.get("--sim-vanish-after-steps")?,
            hang_after_steps: flags.get("--sim-hang-after-steps")?,
            deaf_after_adds: flags.get("--sim-deaf-after-adds")?,
        },
    };
    for (flag, value) in &flags.0 {
        if flag.starts_with("--sim-") {
            return Err(CliError::Unknown(flag.clone()));
        }
        info!(flag, value, "means nothing to a simulation");
    }
    let ranked = |offset: u32| {
        let mut config = config.clone();
        config.dp_rank += offset;
        if let Some(connector) = &mut config.connector {
            if connector.port > 0 {
                connector.port += offset as u16;
            }
            if engines > 1 {
                connector.engine_id = format!("{}_dp{}", connector.engine_id, config.dp_rank);
            }
        }
        config
    };
    Ok(Some((0..engines).map(ranked).collect()))
}

fn limits(
    flags: &mut Flags,
    folder: &ModelFolder,
    connector: Option<&(Connector, bool)>,
    events: bool,
) -> Result<Limits, CliError> {
    let max_model_len = flags
        .count("--max-model-len")?
        .unwrap_or(folder.max_model_len);
    let block_size = flags.count("--block-size")?.unwrap_or(16).max(1);
    let enough = DEFAULT_BLOCKS.max(max_model_len.div_ceil(block_size) + 1);
    Ok(Limits {
        max_model_len,
        max_num_seqs: flags.count("--max-num-seqs")?.unwrap_or(256),
        max_num_batched_tokens: flags.count("--max-num-batched-tokens")?.unwrap_or(8192),
        block_size,
        num_blocks: flags.count("--num-gpu-blocks-override")?.unwrap_or(enough),
        prefix_caching: {
            flags.switch("--enable-prefix-caching");
            !flags.switch("--no-enable-prefix-caching")
        },
        events,
        by_priority: match flags.text("--scheduling-policy")?.as_deref() {
            None | Some("fcfs") => false,
            Some("priority") => true,
            Some(other) => {
                return Err(CliError::Value {
                    flag: "--scheduling-policy".into(),
                    value: other.into(),
                    reason: "known: fcfs, priority".into(),
                });
            }
        },
        connector: connector.is_some(),
        recompute_failed_loads: connector.is_some_and(|(_, recompute)| *recompute),
        vocab: folder.vocab,
    })
}

fn timing(flags: &mut Flags) -> Result<Timing, CliError> {
    let default = Timing::default();
    Ok(Timing {
        speedup: flags.get("--sim-speedup")?.unwrap_or(default.speedup),
        prefill_per_token: flags.micros("--sim-prefill-us-per-token", default.prefill_per_token)?,
        decode_per_step: flags.micros("--sim-decode-us-per-step", default.decode_per_step)?,
        decode_per_seq: flags.micros("--sim-decode-us-per-seq", default.decode_per_seq)?,
        transfer_per_token: flags
            .micros("--sim-transfer-us-per-token", default.transfer_per_token)?,
        load: flags.millis("--sim-load-ms", default.load)?,
    })
}

fn kv_events(flags: &mut Flags) -> Result<Option<KvEvents>, CliError> {
    let flag = "--kv-events-config";
    let Some(value) = flags.json(flag)? else {
        return Ok(None);
    };
    let events: KvEvents =
        serde_json::from_value(value.clone()).map_err(|reason| CliError::Value {
            flag: flag.into(),
            value: value.to_string(),
            reason: reason.to_string(),
        })?;
    Ok(events.enable_kv_cache_events.then_some(events))
}

/// The connector, and whether a failed fetch is recomputed.
fn connector(flags: &mut Flags) -> Result<Option<(Connector, bool)>, CliError> {
    let lease = flags.millis("--sim-kv-lease-ms", Duration::from_secs(30))?;
    let failure_delay = flags.millis("--sim-kv-failure-ms", Duration::from_secs(5))?;
    let flag = "--kv-transfer-config";
    let Some(value) = flags.json(flag)? else {
        return Ok(None);
    };
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    if text("kv_connector") != Some("NixlConnector") {
        return Err(CliError::Value {
            flag: flag.into(),
            value: value.to_string(),
            reason: "only NixlConnector is simulated".into(),
        });
    }
    let default = Connector::default();
    // The variables that tell vLLM's NIXL connector where its side channel is; without them a free
    // port is taken, as engines on one machine would else have to be told apart.
    let env = |name: &str| std::env::var(name).ok();
    let port = match env("VLLM_NIXL_SIDE_CHANNEL_PORT") {
        Some(port) => port.parse().map_err(|_| CliError::Value {
            flag: "VLLM_NIXL_SIDE_CHANNEL_PORT".into(),
            value: port,
            reason: "not a port".into(),
        })?,
        None => default.port,
    };
    let connector = Connector {
        engine_id: text("engine_id").map_or(default.engine_id, str::to_owned),
        host: env("VLLM_NIXL_SIDE_CHANNEL_HOST").unwrap_or(default.host),
        port,
        lease,
        failure_delay,
    };
    Ok(Some((
        connector,
        text("kv_load_failure_policy") == Some("recompute"),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("config.json"),
            r#"{"vocab_size": 64, "max_position_embeddings": 4096}"#,
        )
        .unwrap();
        folder
    }

    fn parse_line(line: &str) -> Result<Option<Vec<Config>>, CliError> {
        let folder = model();
        let model = folder.path().display().to_string();
        parse(
            line.split_whitespace()
                .map(|word| word.replace("MODEL", &model)),
        )
    }

    #[test]
    fn flags_are_read_as_vllm_reads_them() {
        let configs = parse_line(
            "serve MODEL --headless --data-parallel-address 10.0.0.1 --data_parallel_rpc_port=77 \
             --data-parallel-size-local 2 --data-parallel-start-rank 4 --max-model-len 1K \
             --dtype bfloat16 --enforce-eager --no-enable-prefix-caching --sim-speedup 0 \
             --kv-events-config {\"enable_kv_cache_events\":true}",
        )
        .unwrap()
        .unwrap();
        let ranks: Vec<u32> = configs.iter().map(|config| config.dp_rank).collect();
        assert_eq!(ranks, [4, 5]);
        let config = &configs[0];
        assert_eq!(config.handshake, "tcp://10.0.0.1:77");
        assert_eq!(config.limits.max_model_len, 1024);
        assert!(!config.limits.prefix_caching);
        assert!(config.limits.events);
        assert!(
            config
                .timing
                .step(&crate::scheduler::Plan::default())
                .is_zero()
        );
    }

    #[test]
    fn what_a_simulation_does_not_know_of_itself_is_refused() {
        let error = parse_line("serve MODEL --headless --sim-speed 3").unwrap_err();
        assert!(matches!(error, CliError::Unknown(flag) if flag == "--sim-speed"));
        assert!(matches!(parse_line("serve MODEL"), Err(CliError::Usage)));
        assert!(matches!(
            parse_line("serve MODEL --headless --block-size x"),
            Err(CliError::Value { .. })
        ));
    }
}
