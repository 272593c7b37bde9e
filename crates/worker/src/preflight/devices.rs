//! Whether the GPUs have the memory that the engines will ask for.

use std::{env, time::Duration};

use stator_engine::flags::Given;
use tokio::{process::Command, time};

use super::Finding;
use crate::{
    cli::EngineKind,
    config::Config,
    launch::{devices_each, spans_machines},
};

/// vLLM's default of `--gpu-memory-utilization` (0.32, config/cache.py).
const DEFAULT_SHARE: f64 = 0.92;

/// A driver that answers later than this is not asked any longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A GPU, in MiB.
#[derive(Clone, Debug, PartialEq)]
struct Device {
    index: String,
    uuid: String,
    total: f64,
    free: f64,
}

pub(super) async fn examine(config: &Config) -> Vec<Finding> {
    let cpu = config.vllm.as_ref().is_some_and(|vllm| vllm.is_cpu());
    if cpu || config.engine_kind() != EngineKind::Vllm || config.engine_keep {
        return Vec::new();
    }
    let Some(devices) = ask().await else {
        return Vec::new();
    };
    let visible = env::var("CUDA_VISIBLE_DEVICES").ok();
    judge(config, &devices, visible.as_deref())
}

/// Asks the driver's own program; `None` where there is none.
async fn ask() -> Option<Vec<Device>> {
    let query = Command::new("nvidia-smi")
        .args([
            "--query-gpu=index,uuid,memory.total,memory.free",
            "--format=csv,noheader,nounits",
        ])
        .kill_on_drop(true)
        .output();
    let output = time::timeout(PATIENCE, query).await.ok()?.ok()?;
    output
        .status
        .success()
        .then(|| read(&String::from_utf8_lossy(&output.stdout)))
}

fn read(text: &str) -> Vec<Device> {
    let device = |line: &str| {
        let mut fields = line.split(',').map(str::trim);
        Some(Device {
            index: fields.next()?.to_owned(),
            uuid: fields.next()?.to_owned(),
            total: fields.next()?.parse().ok()?,
            free: fields.next()?.parse().ok()?,
        })
    };
    text.lines().filter_map(device).collect()
}

fn judge(config: &Config, devices: &[Device], visible: Option<&str>) -> Vec<Finding> {
    let given = Given::read(&config.engine_args);
    let share = given.value("gpu-memory-utilization");
    let share = share.and_then(|share| share.parse().ok());
    let share: f64 = share.unwrap_or(DEFAULT_SHARE);
    let count = config.data_parallel_size as usize * devices_each(&config.engine_args);
    let visible = visible.filter(|list| !list.is_empty());
    let chosen: Vec<&Device> = match visible {
        Some(list) => list
            .split(',')
            .map(str::trim)
            .filter_map(|name| {
                let is_it =
                    |device: &&Device| device.index == name || device.uuid.starts_with(name);
                devices.iter().find(is_it)
            })
            .take(count)
            .collect(),
        None => devices.iter().take(count).collect(),
    };
    if chosen.len() < count && !spans_machines(&given) {
        return vec![Finding::error(
            "devices",
            format!(
                "the engines take {count} GPUs, and {} can be had",
                chosen.len()
            ),
            "a smaller --tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size, or more in \
             CUDA_VISIBLE_DEVICES",
        )];
    }
    let findings = chosen.into_iter().map(|device| {
        let Device {
            index, total, free, ..
        } = device;
        let asked = total * share;
        let found = format!(
            "GPU {index} has {:.1} of {:.1} GiB free, {:.1} GiB are asked for (--gpu-memory-utilization {share})",
            free / 1024.0,
            total / 1024.0,
            asked / 1024.0
        );
        if *free >= asked {
            Finding::fine("devices", found)
        } else {
            // Rounded down, with a little left for what the driver itself takes.
            let fits = ((free / total - 0.01) * 100.0).floor() / 100.0;
            let remedy = format!(
                "end what uses it (nvidia-smi shows it), choose another in CUDA_VISIBLE_DEVICES, or say \
                 --gpu-memory-utilization {:.2}",
                fits.max(0.01)
            );
            Finding::error("devices", found, remedy)
        }
    });
    findings.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Severity;

    const TWO: &str = "0, GPU-aa, 81559, 81000\n1, GPU-bb, 81559, 20000\nnonsense\n";

    fn severities(flags: &str, visible: Option<&str>) -> Vec<Severity> {
        let config = Config {
            engine_args: flags.split_whitespace().map(str::to_owned).collect(),
            ..Config::default()
        };
        let findings = judge(&config, &read(TWO), visible);
        findings.iter().map(|finding| finding.severity).collect()
    }

    #[test]
    fn a_device_without_the_memory_that_is_asked_for_is_an_error() {
        use Severity::{Error, Fine};
        assert_eq!(severities("", None), [Fine]);
        assert_eq!(severities("-tp 2", None), [Fine, Error]);
        assert_eq!(
            severities("-tp 2 --gpu-memory-util 0.2", None),
            [Fine, Fine]
        );
        assert_eq!(severities("", Some("1")), [Error]);
        assert_eq!(severities("", Some("GPU-a")), [Fine]);
        assert_eq!(severities("-tp 4", None), [Error]);
        // Ray and further nodes bring their own.
        assert_eq!(severities("-tp 4 --nnodes 2", None), [Fine, Error]);
    }

    #[test]
    fn the_share_that_would_fit_is_named() {
        let config = Config::default();
        let findings = judge(&config, &read(TWO), Some("1"));
        assert!(
            findings[0].remedy.contains("--gpu-memory-utilization 0.23"),
            "{}",
            findings[0]
        );
    }
}
