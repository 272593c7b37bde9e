//! What holds whatever is asked for: no block is lost, no limit is passed, and an answer does not
//! depend on what else runs.

use proptest::prelude::*;

use super::*;
use crate::request::Sampling;

fn limits() -> Limits {
    Limits {
        max_model_len: 128,
        max_num_seqs: 4,
        max_num_batched_tokens: 24,
        block_size: 4,
        num_blocks: 34,
        prefix_caching: true,
        events: true,
        by_priority: false,
        connector: true,
        recompute_failed_loads: false,
        vocab: 100,
    }
}

fn model() -> Model {
    Model {
        choices: 100,
        special: vec![0],
        eos_one_in: 0,
    }
}

fn request(id: &str, prompt: &[u32], max_tokens: u32) -> Request {
    Request {
        id: id.into(),
        client: 0,
        prompt: prompt.to_vec(),
        sampling: Sampling {
            max_tokens,
            ..Sampling::default()
        },
        cache_salt: None,
        lora: None,
        priority: 0,
        transfer: Transfer::None,
        abort_immediately: false,
    }
}

fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let (model, sampling) = (model(), Sampling::default());
    let mut chain = model.start(None).extend_all(prompt);
    let mut output = Vec::new();
    for _ in 0..count {
        output.push(model.next(chain, &sampling, &output));
        chain = chain.extend(output[output.len() - 1]);
    }
    output
}

/// Runs until nothing is left to compute; the answers by id.
fn run(scheduler: &mut Scheduler) -> HashMap<String, (Vec<u32>, Option<Finish>)> {
    let mut answers: HashMap<String, (Vec<u32>, Option<Finish>)> = HashMap::new();
    loop {
        let plan = scheduler.plan(0.0);
        let empty = plan.is_empty();
        for output in scheduler.commit(plan) {
            let answer = answers.entry(output.id.to_string()).or_default();
            answer.0.extend(output.tokens);
            answer.1 = answer.1.or(output.finish);
        }
        if empty {
            return answers;
        }
    }
}

#[test]
fn a_long_prompt_is_computed_in_chunks_beside_what_runs() {
    let mut scheduler = Scheduler::new(limits(), model());
    scheduler.add(request("short", &[1, 2, 3], 9), 0.0).unwrap();
    let plan = scheduler.plan(0.0);
    assert_eq!((plan.prefill_tokens, plan.decode_seqs), (3, 0));
    scheduler.commit(plan);
    let prompt: Vec<u32> = (0..60).collect();
    scheduler.add(request("long", &prompt, 1), 0.0).unwrap();
    let mut chunks = Vec::new();
    while scheduler.unfinished() == 2 {
        let plan = scheduler.plan(0.0);
        chunks.push((plan.prefill_tokens, plan.decode_seqs));
        scheduler.commit(plan);
    }
    assert_eq!(chunks, [(23, 1), (23, 1), (14, 1)]);
}

#[test]
fn a_prompt_seen_before_is_taken_from_the_cache_but_for_its_last_token() {
    let mut scheduler = Scheduler::new(limits(), model());
    let prompt: Vec<u32> = (0..16).collect();
    scheduler.add(request("a", &prompt, 1), 0.0).unwrap();
    run(&mut scheduler);
    scheduler.add(request("b", &prompt, 1), 0.0).unwrap();
    let plan = scheduler.plan(0.0);
    assert_eq!(plan.prefill_tokens, 4);
    let outputs = scheduler.commit(plan);
    assert_eq!(
        outputs[0].prefill,
        Some(PrefillStats {
            prompt: 16,
            local_cached: 12,
            external_cached: 0,
            created: 4
        })
    );
}

#[test]
fn a_salted_prompt_shares_nothing() {
    let mut scheduler = Scheduler::new(limits(), model());
    let prompt: Vec<u32> = (0..16).collect();
    scheduler.add(request("a", &prompt, 1), 0.0).unwrap();
    run(&mut scheduler);
    let salted = Request {
        cache_salt: Some("tenant".into()),
        ..request("b", &prompt, 1)
    };
    scheduler.add(salted, 0.0).unwrap();
    assert_eq!(scheduler.plan(0.0).prefill_tokens, 16);
}

#[test]
fn a_duplicate_id_is_an_error() {
    let mut scheduler = Scheduler::new(limits(), model());
    scheduler.add(request("a", &[1], 1), 0.0).unwrap();
    assert!(scheduler.add(request("a", &[2], 1), 0.0).is_err());
}

#[test]
fn who_came_last_gives_way_when_blocks_run_out_and_still_answers_the_same() {
    let mut scheduler = Scheduler::new(limits(), model());
    let (a, b): (Vec<u32>, Vec<u32>) = ((0..40).collect(), (50..90).collect());
    scheduler.add(request("a", &a, 60), 0.0).unwrap();
    scheduler.add(request("b", &b, 60), 0.0).unwrap();
    let mut preempted = Vec::new();
    let mut tokens: HashMap<String, Vec<u32>> = HashMap::new();
    while scheduler.unfinished() > 0 {
        let plan = scheduler.plan(0.0);
        for output in scheduler.commit(plan) {
            if output.events.iter().any(|e| e.kind == EventKind::Preempted) {
                preempted.push(output.id.to_string());
            }
            tokens
                .entry(output.id.to_string())
                .or_default()
                .extend(output.tokens);
        }
    }
    assert_eq!(preempted, ["b"]);
    assert_eq!(tokens["a"], expected(&a, 60));
    assert_eq!(tokens["b"], expected(&b, 60));
    assert_eq!(
        scheduler.pool().free_blocks(),
        scheduler.pool().usable_blocks()
    );
}

#[test]
fn the_most_important_request_runs_first_under_the_priority_policy() {
    let limits = Limits {
        by_priority: true,
        max_num_seqs: 1,
        ..limits()
    };
    let mut scheduler = Scheduler::new(limits, model());
    for (id, priority) in [("low", 5), ("high", -1), ("same", 5)] {
        let request = Request {
            priority,
            ..request(id, &[1, 2], 1)
        };
        scheduler.add(request, 0.0).unwrap();
    }
    let mut order = Vec::new();
    while scheduler.unfinished() > 0 {
        let plan = scheduler.plan(0.0);
        order.extend(scheduler.commit(plan).into_iter().map(|o| o.id.to_string()));
    }
    assert_eq!(order, ["high", "low", "same"]);
}

#[test]
fn a_produced_prompt_stays_until_it_is_unpinned_and_continues_elsewhere_the_same() {
    let prompt: Vec<u32> = (0..10).collect();
    let mut producer = Scheduler::new(limits(), model());
    let produce = Request {
        transfer: Transfer::Produce,
        ..request("p", &prompt, 1)
    };
    producer.add(produce, 0.0).unwrap();
    let plan = producer.plan(0.0);
    let handle = producer.commit(plan).remove(0).kv.unwrap();
    assert_eq!((handle.tokens, handle.blocks.len()), (10, 3));
    assert_eq!(producer.pinned_blocks(), 3);

    let mut consumer = Scheduler::new(limits(), model());
    let fetch = Request {
        transfer: Transfer::Fetch(Value::Nil),
        ..request("d", &prompt, 5)
    };
    consumer.add(fetch, 0.0).unwrap();
    let plan = consumer.plan(0.0);
    assert!(plan.is_empty());
    let serial = plan.loads[0].serial;
    consumer.commit(plan);
    consumer.loaded(serial, Some((handle.chain, handle.tokens)));
    let plan = consumer.plan(0.0);
    assert_eq!(plan.prefill_tokens, 1);
    let first = consumer.commit(plan).remove(0);
    assert_eq!(first.prefill.unwrap().external_cached, 10);
    let mut tokens = first.tokens;
    tokens.extend(run(&mut consumer).remove("d").unwrap().0);
    assert_eq!(tokens, expected(&prompt, 5));

    assert!(producer.unpin("p"));
    assert!(!producer.unpin("p"));
    assert_eq!(
        producer.pool().free_blocks(),
        producer.pool().usable_blocks()
    );
}

#[test]
fn foreign_kv_gives_other_tokens() {
    let mut consumer = Scheduler::new(limits(), model());
    let fetch = Request {
        transfer: Transfer::Fetch(Value::Nil),
        ..request("d", &[1, 2, 3], 5)
    };
    let serial = consumer.add(fetch, 0.0).unwrap();
    let plan = consumer.plan(0.0);
    consumer.commit(plan);
    consumer.loaded(serial, Some((Chain(99), 3)));
    assert_ne!(run(&mut consumer)["d"].0, expected(&[1, 2, 3], 5));
}

#[test]
fn a_failed_load_is_an_error_or_a_computation() {
    for recompute in [false, true] {
        let limits = Limits {
            recompute_failed_loads: recompute,
            ..limits()
        };
        let mut scheduler = Scheduler::new(limits, model());
        let fetch = Request {
            transfer: Transfer::Fetch(Value::Nil),
            ..request("d", &[1, 2, 3], 2)
        };
        let serial = scheduler.add(fetch, 0.0).unwrap();
        let plan = scheduler.plan(0.0);
        scheduler.commit(plan);
        scheduler.loaded(serial, None);
        let answer = run(&mut scheduler).remove("d").unwrap();
        if recompute {
            assert_eq!(answer, (expected(&[1, 2, 3], 2), Some(Finish::Length)));
        } else {
            assert_eq!(answer, (vec![], Some(Finish::Error)));
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Add {
        prompt: Vec<u32>,
        max: u32,
        kind: u8,
    },
    Abort(usize),
    Plan {
        abort_between: Option<usize>,
    },
    Loaded(bool),
    Unpin(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (proptest::collection::vec(0u32..4, 1..60), 1u32..40, 0u8..6)
            .prop_map(|(prompt, max, kind)| Step::Add { prompt, max, kind }),
        1 => (0usize..20).prop_map(Step::Abort),
        8 => proptest::option::weighted(0.1, 0usize..20)
            .prop_map(|abort_between| Step::Plan { abort_between }),
        1 => any::<bool>().prop_map(Step::Loaded),
        1 => (0usize..20).prop_map(Step::Unpin),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_block_is_lost_and_no_limit_passed(
        steps in proptest::collection::vec(any_step(), 1..120),
        by_priority in any::<bool>(),
    ) {
        let limits = Limits { by_priority, ..limits() };
        let mut scheduler = Scheduler::new(limits.clone(), model());
        let mut prompts: Vec<(String, Vec<u32>, u32)> = Vec::new();
        let mut loads: Vec<(Serial, Vec<u32>)> = Vec::new();
        let mut serials: HashMap<Serial, usize> = HashMap::new();
        let mut answers: HashMap<String, Vec<u32>> = HashMap::new();
        let mut commit = |scheduler: &mut Scheduler, plan: Plan| {
            for output in scheduler.commit(plan) {
                answers.entry(output.id.to_string()).or_default().extend(output.tokens);
                if output.finish == Some(Finish::Length) {
                    let index: usize = output.id.parse().unwrap();
                    let (_, prompt, max) = &prompts_of(index);
                    assert_eq!(answers[&*output.id], expected(prompt, *max as usize));
                }
            }
        };
        thread_local! {
            static PROMPTS: std::cell::RefCell<Vec<(String, Vec<u32>, u32)>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        fn prompts_of(index: usize) -> (String, Vec<u32>, u32) {
            PROMPTS.with_borrow(|all| all[index].clone())
        }
        PROMPTS.with_borrow_mut(Vec::clear);
        for step in steps {
            match step {
                Step::Add { prompt, max, kind } => {
                    let index = prompts.len();
                    let transfer = match kind {
                        0 => Transfer::Produce,
                        1 => Transfer::Fetch(Value::Nil),
                        _ => Transfer::None,
                    };
                    let request = Request {
                        transfer,
                        priority: i64::from(kind % 3),
                        ..request(&index.to_string(), &prompt, max)
                    };
                    prompts.push((index.to_string(), prompt, max));
                    PROMPTS.with_borrow_mut(|all| all.clone_from(&prompts));
                    let serial = scheduler.add(request, 0.0).unwrap();
                    serials.insert(serial, index);
                }
                Step::Abort(index) => {
                    scheduler.abort(&index.to_string());
                }
                Step::Plan { abort_between } => {
                    let plan = scheduler.plan(0.0);
                    prop_assert!(plan.prefill_tokens + plan.decode_seqs <= limits.max_num_batched_tokens);
                    prop_assert!(scheduler.running() <= limits.max_num_seqs);
                    for load in &plan.loads {
                        loads.push((load.serial, prompts[serials[&load.serial]].1.clone()));
                    }
                    if let Some(index) = abort_between {
                        scheduler.abort(&index.to_string());
                    }
                    commit(&mut scheduler, plan);
                }
                Step::Loaded(ok) => {
                    if let Some((serial, prompt)) = loads.pop() {
                        let chain = model().start(None).extend_all(&prompt);
                        scheduler.loaded(serial, ok.then_some((chain, prompt.len())));
                    }
                }
                Step::Unpin(index) => {
                    scheduler.unpin(&index.to_string());
                }
            }
        }
        // Whatever is left can be brought to an end.
        for _ in 0..3 {
            for index in 0..prompts.len() {
                scheduler.unpin(&index.to_string());
            }
            loop {
                let plan = scheduler.plan(0.0);
                for load in &plan.loads {
                    loads.push((load.serial, prompts[serials[&load.serial]].1.clone()));
                }
                let idle = plan.is_empty() && loads.is_empty();
                commit(&mut scheduler, plan);
                for (serial, prompt) in std::mem::take(&mut loads) {
                    let chain = model().start(None).extend_all(&prompt);
                    scheduler.loaded(serial, Some((chain, prompt.len())));
                }
                for index in 0..prompts.len() {
                    scheduler.unpin(&index.to_string());
                }
                if idle {
                    break;
                }
            }
        }
        prop_assert_eq!(scheduler.unfinished(), 0);
        prop_assert_eq!(scheduler.pinned_blocks(), 0);
        prop_assert_eq!(scheduler.pool().free_blocks(), scheduler.pool().usable_blocks());
        prop_assert!(scheduler.reset_prefix_cache(false, 0.0));
    }
}
