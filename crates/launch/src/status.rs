//! `stator status`: the topologies of this user that run on this machine.

use anyhow::{Context, Result};

use crate::cli::Status as Args;
use crate::probe::Probe;
use crate::state::{self, Topology};
use crate::table::state_of;

/// Prints every live topology and what its processes say of themselves.
pub(crate) async fn run(args: &Args) -> Result<()> {
    let root = state::root(args.state_dir.as_deref()).context("open the state folder")?;
    let topologies = Topology::load_all(&root);
    let probe = Probe::new();
    let mut report = Vec::new();
    for topology in topologies {
        let mut rows = Vec::new();
        for process in &topology.processes {
            let status = match &process.system_url {
                Some(url) => probe.status(url).await,
                None => None,
            };
            rows.push((process.clone(), status));
        }
        report.push((topology, rows));
    }
    if args.json {
        let json: Vec<_> = report
            .iter()
            .map(|(topology, rows)| {
                let processes: Vec<_> = rows
                    .iter()
                    .map(|(process, status)| serde_json::json!({"process": process, "status": status}))
                    .collect();
                serde_json::json!({"topology": topology, "processes": processes})
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(());
    }
    if report.is_empty() {
        println!("nothing runs; start with: stator up MODEL");
    }
    for (topology, rows) in report {
        println!("{}  {}  {}", topology.name, topology.url, topology.model);
        for (process, status) in rows {
            let state = match (&process.note, &status) {
                (Some(note), _) => note.clone(),
                (None, Some(status)) => state_of(status),
                (None, None) => "does not answer".into(),
            };
            let load = status
                .filter(|s| s.is_ready() && s.role != "processor")
                .map_or(String::new(), |s| {
                    let kv = s.kv_usage * 100.0;
                    format!("{} running  {} waiting  KV {kv:.0} %", s.running, s.waiting)
                });
            let pid = process.pid.map_or("none".into(), |pid| pid.to_string());
            let gpus = match process.gpus.as_slice() {
                [] => String::new(),
                gpus => format!("  GPU {}", gpus.join(",")),
            };
            println!(
                "  {:<12} pid {pid:<8} {state:<28} {load}{gpus}",
                process.name
            );
        }
    }
    Ok(())
}
