//! What each command line becomes.

use clap::Parser;

use super::*;
use crate::cli::{Cli, Command};

fn up(line: &str) -> Up {
    match Cli::try_parse_from(line.split(' ')).unwrap().command {
        Command::Up(up) => *up,
        other => panic!("not `up`: {other:?}"),
    }
}

fn try_plan(line: &str) -> Result<Plan> {
    Plan::new(&up(line), "m", Path::new("/t"), Path::new("/b"))
}

/// Returns the specs of a topology, each with the system port and ordinal that its position says.
fn specs(line: &str) -> Vec<Spec> {
    let plan = try_plan(line).unwrap();
    let places = (0..).map(|n| Place {
        system_port: n + 1,
        ordinal: n.saturating_sub(1),
        ..Place::default()
    });
    let parts = plan.parts().into_iter().zip(places);
    parts
        .map(|(part, place)| plan.spec(part, place).unwrap())
        .collect()
}

fn line(spec: &Spec) -> String {
    let args: Vec<_> = spec.args.iter().map(|a| a.to_string_lossy()).collect();
    args.join(" ")
}

fn names(line: &str) -> String {
    let names: Vec<String> = specs(line).into_iter().map(|spec| spec.name).collect();
    names.join(" ")
}

fn gpus(line: &str) -> Vec<usize> {
    let plan = try_plan(line).unwrap();
    let parts = plan.parts().into_iter().skip(1);
    parts.map(|part| plan.gpus(part)).collect()
}

#[track_caller]
fn refused(line: &str, because: &str) {
    let error = try_plan(line).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains(because), "{line}: {error}");
}

#[test]
fn one_aggregated_worker_is_what_a_model_alone_means() {
    assert_eq!(names("stator up m"), "processor agg-0");
    let all = specs("stator up m");
    assert!(line(&all[0]).contains("--router-mode round-robin"));
    assert!(!line(&all[1]).contains("--connector"));
    assert_eq!(all[1].program, Path::new("/b/stator-agg"));
}

#[test]
fn workers_relay_where_the_processor_routes_by_caches() {
    let all = specs("stator up m --workers 8 --router kv");
    assert_eq!(all.len(), 9);
    assert!(line(&all[0]).contains("--router-mode kv"));
    let relays = |spec: &Spec| line(spec).contains("--kv-relay embedded");
    assert!(all[1..].iter().all(relays));
    let other = specs("stator up m --workers 8 --router approx");
    assert!(!other.iter().any(relays));
    let off = specs("stator up m --router kv -- --kv-relay off");
    assert!(!off.iter().any(relays));
}

#[test]
fn prefill_and_decode_workers_replace_the_aggregated_one() {
    let both = "stator up m --prefill-workers 1 --decode-workers 1";
    assert_eq!(names(both), "processor prefill-0 decode-0");
    let all = specs(both);
    assert_eq!(all[1].program, Path::new("/b/stator-prefill"));
    assert_eq!(all[2].program, Path::new("/b/stator-decode"));
    for worker in &all[1..] {
        assert!(line(worker).ends_with("--connector nixl"), "{worker:?}");
    }
    let beside = format!("{both} --workers 1");
    assert_eq!(names(&beside), "processor agg-0 prefill-0 decode-0");
    assert!(!line(&specs(&beside)[1]).contains("--connector"));
}

#[test]
fn each_role_is_split_over_its_own_number_of_gpus() {
    let wide = "stator up m --prefill-workers 4 --decode-workers 1 --prefill-tp 1 --decode-tp 4 --router kv";
    let all = specs(wide);
    assert_eq!(all.len(), 6);
    assert!(line(&all[4]).contains("--tensor-parallel-size 1"));
    assert!(line(&all[5]).contains("--tensor-parallel-size 4"));
    assert_eq!(gpus(wide), [1, 1, 1, 1, 4]);
}

#[test]
fn ranks_belong_to_every_worker_and_each_takes_its_gpus() {
    let ranks = "stator up m --data-parallel-size 2 --tp 2";
    assert!(line(&specs(ranks)[1]).contains("--tensor-parallel-size 2 --data-parallel-size 2"));
    assert_eq!(gpus(ranks), [4]);
    assert_eq!(
        gpus("stator up m -- -tp 2 -pp=2 --data-parallel-size 3"),
        [12]
    );
    // Two nodes hold half of it each.
    assert_eq!(gpus("stator up m --tp 16 -- --nnodes 2 --node-rank 0"), [8]);
    for none in ["--engine sim", "--engine attach", "--share-gpus"] {
        assert_eq!(gpus(&format!("stator up m --tp 2 {none}")), [0]);
    }
    assert!(line(&specs("stator up m --share-gpus")[1]).contains("--share-gpus"));
}

#[test]
fn a_secondary_node_is_an_engine_without_a_processor() {
    let all = specs("stator up m --headless --tp 16 -- --nnodes 2 --node-rank 1");
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].program, Path::new("/b/stator-agg"));
    let line = line(&all[0]);
    assert!(line.starts_with("--headless --model m"), "{line}");
    assert!(
        line.ends_with("--tensor-parallel-size 16 --nnodes 2 --node-rank 1"),
        "{line}"
    );
    let prefill = "stator up m --headless --disaggregation-mode prefill --prefill-tp 16 -- --nnodes 2 --node-rank 1";
    let prefill = &specs(prefill)[0];
    assert_eq!(prefill.program, Path::new("/b/stator-prefill"));
    let args: Vec<_> = prefill.args.iter().map(|a| a.to_string_lossy()).collect();
    assert_eq!(
        args.join(" "),
        "--headless --model m --connector nixl --tensor-parallel-size 16 --nnodes 2 --node-rank 1"
    );
    refused(
        "stator up m --headless --prefill-tp 2",
        "say --disaggregation-mode prefill",
    );
    refused(
        "stator up m --headless --workers 2",
        "stator up --headless m -- ",
    );
}

#[test]
fn workers_get_own_folders_and_ports_and_the_engine_flags_verbatim() {
    let all = specs("stator up m --workers 2 --engine sim -- --max-model-len 64 -O3");
    assert_eq!(all.len(), 3);
    assert!(line(&all[1]).contains("--system-port 2"));
    assert!(line(&all[1]).contains("--run-dir /t/agg-0"));
    assert!(line(&all[2]).contains("--run-dir /t/agg-1"));
    assert!(line(&all[2]).ends_with("--engine sim --max-model-len 64 -O3"));
}

#[test]
fn arguments_of_a_role_reach_that_role() {
    let all = specs(
        "stator up m --prefill-workers 1 --decode-workers 1 --prefill-arg --max-num-seqs --prefill-arg 4 \
         --decode-arg=-O0 --processor-arg --threads --processor-arg 2"
            .replace("         ", "")
            .as_str(),
    );
    assert!(line(&all[0]).ends_with("--threads 2"));
    assert!(line(&all[1]).ends_with("--max-num-seqs 4"));
    assert!(line(&all[2]).ends_with("-O0"));
}

#[test]
fn when_a_decode_worker_prefills_is_the_processors_to_decide() {
    let both = "stator up m --prefill-workers 1 --decode-workers 1";
    let all = specs(&format!(
        "{both} --conditional-disagg fixed --disagg-min-prefill-tokens 64 --disagg-max-prefill-queue 9000 \
         --prefill-dispatch queue"
    ));
    assert!(line(&all[0]).contains(
        "--conditional-disagg fixed --disagg-min-prefill-tokens 64 --disagg-max-prefill-queue 9000 \
         --prefill-dispatch queue"
    ));
    let plain = specs(both);
    assert!(!line(&plain[0]).contains("disagg") && !line(&plain[0]).contains("dispatch"));
}

#[test]
fn several_connectors_keep_their_order_and_reach_every_worker() {
    let all = specs(
        "stator up m --prefill-workers 1 --decode-workers 1 --connector lmcache --connector nixl",
    );
    for worker in &all[1..] {
        assert!(line(worker).ends_with("--connector lmcache --connector nixl"));
    }
    let own =
        r#"stator up m --prefill-workers 1 --decode-workers 1 -- --kv-transfer-config {"a":1}"#;
    assert!(!line(&specs(own)[1]).contains("--connector"));
}

#[test]
fn keys_never_stand_on_a_command_line() {
    let all = specs("stator up m --api-key s3cret --api-key other");
    assert!(all.iter().all(|spec| !line(spec).contains("s3cret")));
    let keys = ("STATOR_API_KEY", "s3cret,other".into());
    assert!(all[0].env.contains(&keys));
    assert!(all[1].env.iter().all(|(name, _)| *name != "STATOR_API_KEY"));
}

#[test]
fn attached_engines_dial_a_row_of_ports_per_worker() {
    let all = specs("stator up m --workers 2 --engine attach --attach-port 4000");
    assert!(line(&all[2]).contains("--engine-attach tcp://127.0.0.1:4001"));
    let all = specs(
        "stator up m --prefill-workers 1 --decode-workers 1 --data-parallel-size 2 --engine attach --attach-port 4000",
    );
    assert_eq!(all[2].attach_port, Some(4002));
    let plan = try_plan("stator up m --workers 2 --engine attach --attach-port 65535").unwrap();
    let part = Part::Worker {
        role: Role::Agg,
        index: 1,
    };
    let place = Place {
        ordinal: 1,
        ..Place::default()
    };
    let error = plan.spec(part, place).unwrap_err().to_string();
    assert!(error.contains("65535"), "{error}");
}

#[test]
fn gpus_of_a_worker_are_the_only_ones_it_sees() {
    let plan = try_plan("stator up m --tp 2").unwrap();
    let place = Place {
        gpus: vec!["2".into(), "3".into()],
        ..Place::default()
    };
    let spec = plan.spec(plan.parts()[1], place).unwrap();
    assert!(spec.env.contains(&("CUDA_VISIBLE_DEVICES", "2,3".into())));
}

#[test]
fn what_contradicts_itself_is_refused_with_what_works() {
    let both = "stator up m --prefill-workers 1 --decode-workers 1";
    for (line, because) in [
        (
            "stator up m --prefill-workers 2".into(),
            "add --decode-workers 1",
        ),
        (
            "stator up m --decode-workers 2".into(),
            "add --prefill-workers 1",
        ),
        ("stator up m --workers 0".into(), "say --workers 1"),
        ("stator up m --decode-tp 2".into(), "say --tp"),
        (format!("{both} --tp 2"), "say --prefill-tp and --decode-tp"),
        (
            format!("{both} --prefill-tp 2 --decode-tp 3"),
            "must be a multiple of the other",
        ),
        ("stator up m --tp 2 -- -tp 4".into(), "keep one of them"),
        (format!("{both} --connector none"), "say --connector nixl"),
        (
            "stator up m --connector none --connector nixl".into(),
            "keep one of them",
        ),
        (
            format!("{both} --connector nixl -- --kv-transfer-config {{}}"),
            "keep one of them",
        ),
        (
            "stator up m --conditional-disagg auto".into(),
            "add --prefill-workers N",
        ),
        (
            "stator up m --disagg-min-prefill-tokens 1".into(),
            "add --prefill-workers N",
        ),
    ] {
        refused(&line, because);
    }
}
