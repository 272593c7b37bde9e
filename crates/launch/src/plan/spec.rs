//! The command line of each process: what a person would type to start it alone.

use std::ffi::OsString;

use anyhow::{Context, Result};
use stator_common::card::Role;
use stator_engine::handoff::ShortName;

use super::{Part, Place, Plan, Spec};
use crate::cli::Engine;

impl Plan {
    /// Describes one process.
    ///
    /// # Errors
    /// There is no port at which its engine could attach.
    pub(crate) fn spec(&self, part: Part, place: Place) -> Result<Spec> {
        let mut spec = Spec {
            name: part.to_string(),
            program: self.bin.join(part.program()),
            args: Vec::new(),
            env: Vec::new(),
            place,
            attach_port: None,
        };
        match part {
            Part::Processor => self.processor(&mut spec),
            Part::Worker { role, .. } => self.worker(&mut spec, role)?,
            Part::Headless(role) => self.headless(&mut spec, role),
        }
        Ok(spec)
    }

    fn processor(&self, spec: &mut Spec) {
        let up = &self.up;
        self.common(spec);
        let args = &mut spec.args;
        push(args, "--http-host", &up.http_host);
        push(args, "--http-port", up.http_port.to_string());
        push(args, "--router-mode", &up.router);
        if let Some(mode) = &up.conditional_disagg {
            push(args, "--conditional-disagg", mode);
        }
        if let Some(tokens) = up.disagg_min_prefill_tokens {
            push(args, "--disagg-min-prefill-tokens", tokens.to_string());
        }
        if let Some(tokens) = up.disagg_max_prefill_queue {
            push(args, "--disagg-max-prefill-queue", tokens.to_string());
        }
        if let Some(when) = &up.prefill_dispatch {
            push(args, "--prefill-dispatch", when);
        }
        if let Some(plane) = &up.event_plane {
            push(args, "--event-plane", plane);
        }
        if let Some(file) = &up.api_key_file {
            push(args, "--api-key-file", file);
        }
        args.extend(up.processor_arg.iter().map(OsString::from));
        if !up.api_key.is_empty() {
            spec.env
                .push(("STATOR_API_KEY", up.api_key.join(",").into()));
        }
    }

    fn worker(&self, spec: &mut Spec, role: Role) -> Result<()> {
        let up = &self.up;
        self.common(spec);
        self.model(spec);
        push(&mut spec.args, "--run-dir", self.dir.join(&spec.name));
        match up.engine {
            Engine::Vllm | Engine::Sim => {
                push(&mut spec.args, "--engine", up.engine.as_flag());
            }
            Engine::Attach => {
                let port = self.attach_port(spec.place.ordinal).with_context(|| {
                    format!(
                        "--attach-port {} leaves no port for {}",
                        up.attach_port, spec.name
                    )
                })?;
                spec.attach_port = Some(port);
                let address = format!("tcp://127.0.0.1:{port}");
                push(&mut spec.args, "--engine-attach", address);
            }
        }
        if let Some(plane) = &up.request_plane {
            push(&mut spec.args, "--request-plane", plane);
        }
        if up.engine_keep {
            spec.args.push("--engine-keep".into());
        }
        if up.share_gpus {
            spec.args.push("--share-gpus".into());
        }
        for connector in self.connectors(role) {
            push(&mut spec.args, "--connector", connector.as_str());
        }
        let engine_args = self.engine_args(role);
        if self.relays(&engine_args) {
            push(&mut spec.args, "--kv-relay", "embedded");
        }
        if let Some(plane) = &up.event_plane {
            push(&mut spec.args, "--event-plane", plane);
        }
        spec.args.extend(engine_args.iter().map(OsString::from));
        if !spec.place.gpus.is_empty() {
            let gpus = spec.place.gpus.join(",");
            spec.env.push(("CUDA_VISIBLE_DEVICES", gpus.into()));
            if spec.place.in_bus_order {
                spec.env.push(("CUDA_DEVICE_ORDER", "PCI_BUS_ID".into()));
            }
        }
        spec.env.extend(spec.place.cores.iter().cloned());
        Ok(())
    }

    /// Says whether workers tell the processor what their caches hold: where that is routed by, and nothing else was
    /// said. An engine that runs already does as it was started.
    fn relays(&self, engine_args: &[String]) -> bool {
        let is_said = |arg: &String| arg == "--kv-relay" || arg.starts_with("--kv-relay=");
        self.up.router == "kv"
            && self.up.engine != Engine::Attach
            && !engine_args.iter().any(is_said)
    }

    /// It takes no requests, so it has no listeners and is in no discovery.
    fn headless(&self, spec: &mut Spec, role: Role) {
        spec.args.push("--headless".into());
        self.model(spec);
        for connector in self.connectors(role) {
            push(&mut spec.args, "--connector", connector.as_str());
        }
        let engine_args = self.engine_args(role);
        spec.args.extend(engine_args.iter().map(OsString::from));
    }

    /// Returns the connectors of a role: those named, else what its hand-off needs.
    pub(super) fn connectors(&self, role: Role) -> Vec<ShortName> {
        let named = self.up.connector.clone();
        let hands_off = matches!(role, Role::Prefill | Role::Decode);
        if named.is_empty() && hands_off && !self.has_transfer_config(role) {
            return vec![ShortName::Nixl];
        }
        named
    }

    fn attach_port(&self, ordinal: u16) -> Option<u16> {
        let ranks = self.up.data_parallel_size.unwrap_or(1);
        let first = self
            .up
            .attach_port
            .checked_add(ordinal.checked_mul(ranks)?)?;
        first.checked_add(ranks - 1)?;
        Some(first)
    }

    fn model(&self, spec: &mut Spec) {
        push(&mut spec.args, "--model", &self.model);
        for served in &self.up.served_model_name {
            push(&mut spec.args, "--served-model-name", served);
        }
    }

    fn common(&self, spec: &mut Spec) {
        let grace = self.up.drain_grace.as_millis();
        let args = &mut spec.args;
        push(args, "--discovery-backend", "file");
        push(args, "--discovery-path", self.dir.join("discovery"));
        push(args, "--system-port", spec.place.system_port.to_string());
        push(args, "--drain-grace", format!("{grace}ms"));
        for (flag, value) in self.up.nats.flags() {
            push(args, flag, value);
        }
    }
}

fn push(args: &mut Vec<OsString>, flag: &str, value: impl Into<OsString>) {
    args.push(flag.into());
    args.push(value.into());
}
