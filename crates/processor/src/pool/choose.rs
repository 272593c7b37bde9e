//! Which target of a pool gets a request.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;
use stator_common::WorkerId;
use stator_common::proto::worker::GenerateRequest;
use stator_router::{
    BlockHash, Candidate, Overlaps, Policy, Reason, Router, Sessions, Share, Terms, backlog::Fit,
    terms,
};
use tracing::debug;

use super::{Availability, Booked, Failed, Pool, Route, Target, Worker};

/// What a target is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Ask<'a> {
    pub(crate) request: &'a GenerateRequest,
    /// Names of the prompt's blocks; none where nobody knows what caches hold.
    pub(crate) blocks: &'a [BlockHash],
    /// What the request says about where it goes.
    pub(crate) route: Option<&'a Route>,
    /// The only worker that may have it.
    pub(crate) pinned: Option<&'a WorkerId>,
    /// Those that had it and failed.
    pub(crate) tried: &'a [Failed],
    /// The one that gets it if it can.
    pub(crate) preferred: Option<&'a WorkerId>,
    /// The worker at the other end of the hand-off.
    pub(crate) partner: Option<&'a Worker>,
    /// Those that may have it; absent: all.
    pub(crate) among: Option<&'a [Arc<Target>]>,
    /// Whether the prompt is computed elsewhere.
    pub(crate) prefilled: bool,
    /// Whether all of the prompt will be in the cache by then, whatever is known of it.
    pub(crate) cached: bool,
}

impl<'a> Ask<'a> {
    /// Asks for all of a request.
    pub(crate) fn new(request: &'a GenerateRequest, tried: &'a [Failed]) -> Self {
        Self {
            request,
            blocks: &[],
            route: None,
            pinned: None,
            tried,
            preferred: None,
            partner: None,
            among: None,
            prefilled: false,
            cached: false,
        }
    }

    /// Returns the number of tokens of the prompt.
    fn tokens(&self) -> usize {
        self.request.prompt_tokens.len() / size_of::<u32>()
    }

    /// Says whether a target may have it, whatever state that is in.
    pub(crate) fn takes(&self, target: &Target) -> bool {
        let asked = self.request.dp_rank;
        !self.tried.iter().any(|failed| failed.covers(target))
            && self
                .pinned
                .is_none_or(|pinned| target.worker.id() == pinned)
            && target.worker.card().serves(&self.request.lora)
            && asked.is_none_or(|rank| target.dp_rank.is_none_or(|own| own == rank))
            && self.partner.is_none_or(|other| target.worker.fits(other))
            && self
                .among
                .is_none_or(|among| among.iter().any(|one| std::ptr::eq(&**one, target)))
    }

    fn session(&self) -> Option<u64> {
        self.route?.session
    }
}

/// What a pool decides with.
pub(super) struct Deciding {
    router: Router,
    sessions: Sessions<(WorkerId, Option<u32>)>,
    /// Used again, so that no decision allocates.
    overlaps: Overlaps,
}

/// Why a target was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Why {
    /// Its session was there last, and it has room.
    Session,
    /// The router's reason.
    Router(Reason),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Session => f.write_str("its session was there last"),
            Self::Router(reason) => reason.fmt(f),
        }
    }
}

/// A target that could have had a request.
pub(crate) struct Considered {
    pub(crate) target: Arc<Target>,
    pub(crate) terms: Terms,
    pub(crate) chosen: Option<Why>,
}

type Open<'a> = SmallVec<[&'a Arc<Target>; 16]>;

impl Deciding {
    pub(super) fn new(policy: Policy, seed: u64, session_ttl: std::time::Duration) -> Self {
        Self {
            router: Router::new(policy, seed),
            sessions: Sessions::new(session_ttl),
            overlaps: Overlaps::default(),
        }
    }
}

impl Pool {
    /// Chooses a target and books the request on it. Absent: nobody can take it.
    pub(crate) fn choose(&self, ask: &Ask<'_>) -> Option<Booked> {
        let targets = self.targets.load();
        let open = open(&targets, ask);
        let mut deciding = self.deciding.lock();
        let Deciding {
            router,
            sessions,
            overlaps,
        } = &mut *deciding;
        let candidates = self.candidates(&open, ask, overlaps);
        let now = self.since.elapsed();
        let last = ask
            .session()
            .and_then(|session| sessions.last(session, now));
        let (index, why) = self.decide(router, last, &open, &candidates, ask)?;
        let target = open[index];
        if let Some(session) = ask.session() {
            let at = (target.worker.id().clone(), target.dp_rank);
            sessions.note(session, at, now);
        }
        let share = Share {
            prompt: ask.tokens() as u64,
            cached: if ask.cached {
                ask.tokens() as u64
            } else {
                candidates[index].cached.device
            },
            prefilled: ask.prefilled,
        };
        // Booked before the router is let go of, so that the next decision sees it.
        let booked = Booked::new(target, share, self.expected(target, ask));
        if let Some(entry) = target.entry() {
            entry.sent(ask.blocks);
        }
        drop(deciding);
        let worker = target.worker.id();
        if let Some(route) = ask.route {
            route.tell(|| format!("{} {}: {why}", target.worker.card().role, target.view()));
        }
        debug!(%worker, request = ask.request.request_id, reason = %why, "routed");
        Some(booked)
    }

    /// Returns who could have a request, and who would get it. Nothing is booked or remembered.
    pub(crate) fn consider(&self, ask: &Ask<'_>) -> Vec<Considered> {
        let targets = self.targets.load();
        let open = open(&targets, ask);
        let mut overlaps = Overlaps::default();
        let candidates = self.candidates(&open, ask, &mut overlaps);
        let mut deciding = self.deciding.lock();
        let mut router = deciding.router.clone();
        let now = self.since.elapsed();
        let last = ask
            .session()
            .and_then(|session| deciding.sessions.last(session, now));
        let chosen = self.decide(&mut router, last, &open, &candidates, ask);
        drop(deciding);
        let weights = self.routing_of(ask).weights(self.stage);
        let considered = open.iter().zip(&candidates).enumerate();
        considered
            .map(|(index, (target, candidate))| Considered {
                target: Arc::clone(target),
                terms: terms(&weights, candidate, ask.tokens() as u64),
                chosen: chosen.filter(|(at, _)| *at == index).map(|(_, why)| why),
            })
            .collect()
    }

    /// Says whether somebody is there who may have a request.
    pub(crate) fn has(&self, ask: &Ask<'_>) -> bool {
        let targets = self.targets.load();
        targets
            .iter()
            .any(|target| target.availability() != Availability::Absent && ask.takes(target))
    }

    /// Says whether there is a target that takes a request when it is connected.
    pub(crate) fn knows(&self, ask: &Ask<'_>) -> bool {
        self.targets.load().iter().any(|target| ask.takes(target))
    }

    /// Writes what each of some targets has of a prompt.
    pub(crate) fn fits(&self, ask: &Ask<'_>, targets: &[Arc<Target>], out: &mut [Option<Fit>]) {
        let prompt = ask.tokens() as u64;
        let knowledge = self.knowledge.as_ref().filter(|_| !ask.blocks.is_empty());
        let mut deciding = self.deciding.lock();
        let overlaps = &mut deciding.overlaps;
        if let Some(knowledge) = knowledge {
            knowledge.overlaps(ask.blocks, ask.tokens(), overlaps);
        }
        for (target, out) in targets.iter().zip(out) {
            let entry = knowledge.and(target.entry());
            let cached = entry.map_or(0, |entry| entry.cached(overlaps).device);
            *out = Some(Fit {
                cached,
                uncached: prompt.saturating_sub(cached),
            });
        }
    }

    /// Returns the tokens of a prompt that whoever has most of it would have to compute.
    pub(crate) fn least_work(&self, ask: &Ask<'_>) -> u64 {
        let targets = self.targets.load();
        let mut fits: SmallVec<[Option<Fit>; 16]> = SmallVec::from_elem(None, targets.len());
        self.fits(ask, &targets, &mut fits);
        let work = fits.iter().flatten().map(|fit| fit.uncached);
        work.min().unwrap_or(ask.tokens() as u64)
    }

    fn candidates<'a>(
        &self,
        open: &Open<'a>,
        ask: &Ask<'_>,
        overlaps: &mut Overlaps,
    ) -> SmallVec<[Candidate<'a>; 16]> {
        let knowledge = self.knowledge.as_ref().filter(|_| !ask.blocks.is_empty());
        if let Some(knowledge) = knowledge {
            knowledge.overlaps(ask.blocks, ask.tokens(), overlaps);
        }
        open.iter()
            .map(|target| {
                let mut candidate =
                    Candidate::new(target.worker.id(), target.dp_rank, target.load());
                candidate.room = target.room;
                if let (Some(_), Some(entry)) = (knowledge, target.entry()) {
                    candidate.cached = entry.cached(overlaps);
                }
                candidate
            })
            .collect()
    }

    fn decide(
        &self,
        router: &mut Router,
        last: Option<&(WorkerId, Option<u32>)>,
        open: &Open<'_>,
        candidates: &[Candidate<'_>],
        ask: &Ask<'_>,
    ) -> Option<(usize, Why)> {
        let tokens = ask.tokens() as u64;
        let routing = self.routing_of(ask);
        if let Some((worker, rank)) = last {
            let was =
                |target: &&Arc<Target>| target.worker.id() == worker && target.dp_rank == *rank;
            let weights = routing.weights(self.stage);
            if let Some(index) = open.iter().position(was)
                && !terms(&weights, &candidates[index], tokens).full
            {
                return Some((index, Why::Session));
            }
        }
        let choice = router.choose_by(routing.policy(self.stage), candidates, tokens);
        let choice = choice.ok()?;
        Some((choice.index, Why::Router(choice.reason)))
    }

    fn routing_of(&self, ask: &Ask<'_>) -> super::Routing {
        ask.route
            .map_or(self.routing, |route| route.over(&self.routing))
    }

    /// Returns how many tokens of the prompt the target says that it holds, where its answer will tell whether
    /// that is so.
    fn expected(&self, target: &Target, ask: &Ask<'_>) -> u64 {
        let sampling = ask.request.sampling.as_ref();
        let reads = sampling.is_none_or(|sampling| {
            sampling.skip_reading_prefix_cache != Some(true) && sampling.prompt_logprobs.is_none()
        });
        match target.entry() {
            Some(entry) if reads && !ask.prefilled => entry.told(ask.blocks, ask.tokens()),
            Some(_) | None => 0,
        }
    }
}

/// Returns the targets that may have a request.
fn open<'a>(targets: &'a [Arc<Target>], ask: &Ask<'_>) -> Open<'a> {
    let of = |wanted: Availability| -> Open<'a> {
        let open = targets
            .iter()
            .filter(|target| target.availability() == wanted);
        open.filter(|target| ask.takes(target)).collect()
    };
    let mut open = of(Availability::Open);
    if open.is_empty() {
        // All that are connected failed a moment ago; one of them is still the best there is.
        open = of(Availability::Inhibited);
    }
    if let Some(preferred) = ask.preferred
        && open.iter().any(|target| target.worker.id() == preferred)
    {
        open.retain(|target| target.worker.id() == preferred);
    }
    open
}
