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

/// A GPU, or a part of one.
#[derive(Clone, Debug, PartialEq)]
struct Device {
    index: String,
    uuid: String,
    /// Absent where the driver does not say: of a part, or where the memory is the machine's own.
    memory: Option<Memory>,
}

/// In MiB.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Memory {
    total: f64,
    free: f64,
}

impl Device {
    /// Returns what `CUDA_VISIBLE_DEVICES` calls a part of a GPU: the driver lists those elsewhere, by other names.
    fn part(name: &str) -> Option<Self> {
        name.starts_with("MIG-").then(|| Self {
            index: name.to_owned(),
            uuid: name.to_owned(),
            memory: None,
        })
    }
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
        let (index, uuid) = (fields.next()?.to_owned(), fields.next()?.to_owned());
        let mut size = || fields.next()?.parse().ok();
        let memory = size()
            .zip(size())
            .map(|(total, free)| Memory { total, free });
        Some(Device {
            index,
            uuid,
            memory,
        })
    };
    text.lines().filter_map(device).collect()
}

fn judge(config: &Config, devices: &[Device], visible: Option<&str>) -> Vec<Finding> {
    let given = Given::read(&config.engine_args);
    let share = given.value("gpu-memory-utilization");
    let share = share.and_then(|share| share.parse().ok());
    let share: f64 = share.unwrap_or(DEFAULT_SHARE);
    let visible = visible.filter(|list| !list.is_empty());
    let each = devices_each(&config.engine_args);
    let all = config.data_parallel_size as usize * each;
    // As `launch::devices` has it.
    let (count, least) = match (config.share_gpus, visible) {
        (true, Some(_)) => (all, each),
        (true, None) => (each, each),
        (false, _) => (all, all),
    };
    let chosen: Vec<Device> = match visible {
        Some(list) => list
            .split(',')
            .map(str::trim)
            .filter_map(|name| {
                let is_it =
                    |device: &&Device| device.index == name || device.uuid.starts_with(name);
                Device::part(name).or_else(|| devices.iter().find(is_it).cloned())
            })
            .take(count)
            .collect(),
        None => devices.iter().take(count).cloned().collect(),
    };
    if chosen.len() < least && !spans_machines(&given) {
        return vec![Finding::error(
            "devices",
            format!(
                "the engines take {least} GPUs, and {} can be had",
                chosen.len()
            ),
            "a smaller --tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size, more in \
             CUDA_VISIBLE_DEVICES, or --share-gpus for several ranks",
        )];
    }
    // On the device that has most.
    let sharing = if config.share_gpus {
        all.div_ceil(chosen.len().max(1)) as f64
    } else {
        1.0
    };
    let share = share * sharing;
    let findings = chosen.into_iter().map(|device| {
        let index = device.index;
        let Some(Memory { total, free }) = device.memory else {
            let found = format!("GPU {index}, whose free memory the driver does not tell");
            return Finding::fine("devices", found);
        };
        let asked = total * share;
        let found = format!(
            "GPU {index} has {:.1} of {:.1} GiB free, {:.1} GiB are asked for (--gpu-memory-utilization {share})",
            free / 1024.0,
            total / 1024.0,
            asked / 1024.0
        );
        if free >= asked {
            Finding::fine("devices", found)
        } else {
            // Rounded down, with a little left for what the driver itself takes.
            let fits = ((free / total - 0.01) / sharing * 100.0).floor() / 100.0;
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
    fn a_part_of_a_gpu_counts_as_one_whose_memory_is_not_told() {
        use Severity::{Error, Fine};
        let two = Some("MIG-3d0a6a13-57a5-5d8b, MIG-GPU-bb/1/0");
        assert_eq!(severities("-tp 2", two), [Fine, Fine]);
        assert_eq!(severities("-tp 3", two), [Error]);
        let untold = read("0, GPU-aa, [N/A], [N/A]\n");
        let findings = judge(&Config::default(), &untold, None);
        assert_eq!(findings[0].severity, Fine, "{findings:?}");
    }

    #[test]
    fn engines_that_share_a_device_ask_for_its_memory_together() {
        use Severity::{Error, Fine};
        let judged = |utilization: &str, visible| {
            let config = Config {
                data_parallel_size: 3,
                share_gpus: true,
                engine_args: vec![format!("--gpu-memory-utilization={utilization}")],
                ..Config::default()
            };
            let findings = judge(&config, &read(TWO), visible);
            findings
                .iter()
                .map(|finding| finding.severity)
                .collect::<Vec<_>>()
        };
        assert_eq!(judged("0.3", None), [Fine]);
        assert_eq!(judged("0.4", None), [Error]);
        assert_eq!(judged("0.1", Some("0,1")), [Fine, Fine]);
        assert_eq!(judged("0.2", Some("0,1")), [Fine, Error]);
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
