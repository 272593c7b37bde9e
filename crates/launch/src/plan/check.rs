//! Flags that contradict each other, each refused with the text that works.

use anyhow::{Result, bail, ensure};
use stator_common::card::Role;
use stator_engine::{
    flags::Given,
    handoff::{ShortName, widths_fit},
};

use super::{Plan, role};
use crate::cli::Engine;

/// Refuses a topology that could not serve, and flags that would have no effect.
pub(super) fn contradictions(plan: &Plan) -> Result<()> {
    if plan.up.headless {
        return secondary(plan);
    }
    roles(plan)?;
    routing(plan)?;
    let mut roles = role::ALL.into_iter().filter(|role| plan.count(*role) > 0);
    roles.try_for_each(|role| of_role(plan, role))
}

/// Refuses flags with which workers of this role could not serve.
pub(super) fn of_role(plan: &Plan, role: Role) -> Result<()> {
    sizes(plan, role)?;
    connectors(plan, role)?;
    match role {
        Role::Prefill | Role::Decode => widths(plan),
        Role::Agg | Role::Encode => Ok(()),
    }
}

fn roles(plan: &Plan) -> Result<()> {
    let up = &plan.up;
    match (up.prefill_workers, up.decode_workers) {
        (Some(n), None) => bail!(
            "--prefill-workers {n} needs somebody to continue its prompts: add --decode-workers 1"
        ),
        (None, Some(n)) => {
            bail!("--decode-workers {n} needs somebody to compute prompts: add --prefill-workers 1")
        }
        (Some(_), Some(_)) => {
            ensure!(
                up.tp.is_none() || plan.count(Role::Agg) > 0,
                "--tp is for aggregated workers, and there are none: say --prefill-tp and --decode-tp, or add --workers 1"
            );
        }
        (None, None) => {
            ensure!(
                up.workers != Some(0),
                "--workers 0 leaves nobody to compute: say --workers 1, or --prefill-workers 1 --decode-workers 1"
            );
            for (flag, given) in [
                ("--prefill-tp", up.prefill_tp.is_some()),
                ("--decode-tp", up.decode_tp.is_some()),
                ("--prefill-arg", !up.prefill_arg.is_empty()),
                ("--decode-arg", !up.decode_arg.is_empty()),
            ] {
                ensure!(
                    !given,
                    "{flag} needs --prefill-workers N --decode-workers M; for aggregated workers say --tp, and other flags after --"
                );
            }
        }
    }
    Ok(())
}

fn routing(plan: &Plan) -> Result<()> {
    let up = &plan.up;
    for (flag, given) in [
        ("--conditional-disagg", up.conditional_disagg.is_some()),
        (
            "--disagg-min-prefill-tokens",
            up.disagg_min_prefill_tokens.is_some(),
        ),
        (
            "--disagg-max-prefill-queue",
            up.disagg_max_prefill_queue.is_some(),
        ),
        ("--prefill-dispatch", up.prefill_dispatch.is_some()),
    ] {
        ensure!(
            !given || plan.disaggregated(),
            "{flag} is about prefill workers, and there is none; add --prefill-workers N --decode-workers M"
        );
    }
    Ok(())
}

/// Refuses a size that is given twice.
fn sizes(plan: &Plan, role: Role) -> Result<()> {
    let up = &plan.up;
    let args: Vec<String> = [plan.extra(role), &up.worker_args].concat();
    let given = Given::read(&args);
    let data_parallel = up.data_parallel_size.map(|n| ("--data-parallel-size", n));
    for (name, own) in [
        ("tensor-parallel-size", plan.tp(role)),
        ("data-parallel-size", data_parallel),
    ] {
        if let (Some((flag, own)), Some(theirs)) = (own, given.value(name))
            && theirs != own.to_string()
        {
            bail!("{flag} {own} and --{name} {theirs} contradict each other: keep one of them");
        }
    }
    Ok(())
}

fn connectors(plan: &Plan, role: Role) -> Result<()> {
    let named = &plan.up.connector;
    let none = named.contains(&ShortName::None);
    let other = named.iter().find(|name| **name != ShortName::None);
    if let Some(other) = other.filter(|_| none) {
        bail!(
            "--connector none and --connector {} contradict each other: keep one of them",
            other.as_str()
        );
    }
    let configured = plan.has_transfer_config(role);
    ensure!(
        named.is_empty() || !configured,
        "--connector and --kv-transfer-config contradict each other: keep one of them"
    );
    let hands_off = matches!(role, Role::Prefill | Role::Decode);
    ensure!(
        !hands_off || !none,
        "--connector none leaves {role} workers without a way to hand KV on: say --connector nixl, or --workers N \
         in place of --prefill-workers and --decode-workers"
    );
    Ok(())
}

/// Refuses decode engines that could not read what prefill engines wrote.
fn widths(plan: &Plan) -> Result<()> {
    let width = |role| -> u32 {
        let args = plan.engine_args(role);
        let given = Given::read(&args);
        let size = given.value("tensor-parallel-size");
        // One that is no number is refused by the worker, which knows its flag.
        size.and_then(|size| size.parse().ok()).unwrap_or(1).max(1)
    };
    let (prefill, decode) = (width(Role::Prefill), width(Role::Decode));
    ensure!(
        widths_fit(prefill, decode),
        "engines split over {decode} GPUs cannot take over KV from engines split over {prefill}: \
         one of --decode-tp and --prefill-tp must be a multiple of the other"
    );
    Ok(())
}

fn secondary(plan: &Plan) -> Result<()> {
    let up = &plan.up;
    for (flag, given) in [
        ("--workers", up.workers.is_some()),
        ("--prefill-workers", up.prefill_workers.is_some()),
        ("--decode-workers", up.decode_workers.is_some()),
        ("--engine", up.engine != Engine::Vllm),
        ("--engine-keep", up.engine_keep),
        ("--conditional-disagg", up.conditional_disagg.is_some()),
    ] {
        ensure!(
            !given,
            "{flag} is for the first node; on a secondary one say: stator up --headless {} -- and the vLLM flags of \
             the first node, with this node's --node-rank",
            plan.model
        );
    }
    let role = plan.headless_role();
    for (flag, given, of) in [
        ("--tp", up.tp.is_some(), Role::Agg),
        ("--prefill-tp", up.prefill_tp.is_some(), Role::Prefill),
        ("--prefill-arg", !up.prefill_arg.is_empty(), Role::Prefill),
        ("--decode-tp", up.decode_tp.is_some(), Role::Decode),
        ("--decode-arg", !up.decode_arg.is_empty(), Role::Decode),
    ] {
        ensure!(
            !given || of == role,
            "{flag} is for {of} workers: say --disaggregation-mode {of}, or leave it out"
        );
    }
    sizes(plan, role)?;
    connectors(plan, role)
}

impl Plan {
    /// Says whether vLLM's own description of its connectors was given.
    pub(super) fn has_transfer_config(&self, role: Role) -> bool {
        let args = [self.extra(role), &self.up.worker_args].concat();
        Given::read(&args).has("kv-transfer-config")
    }
}
