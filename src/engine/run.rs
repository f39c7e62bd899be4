//! The run: decides, lends slots, starts attempts, and says what happens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::Scope;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use petgraph::graph::NodeIndex;

use super::attempt::{Around, Failure, Reply, Said, Task, attempt};
use super::bind::{Bound, Decision, bind, decide};
use super::check::check_inputs;
use super::ended::{downstream, last_lines};
use super::hands::{Ended, Hands};
use super::pending::{Log, Queued, Running};
use super::prepare::{Prepared, prepare};
use super::ready::Ready;
use super::retry::pause;
use super::rooms::Rooms;
use super::slots::{Grant, Slots};
use super::worker::{Program, attempt_in_worker};
use super::{Outcome, RunEvent, Session, machine, outputs, scratch, unchanged};
use crate::digest::Digest;
use crate::lineage::{
    Journal, Made, Past, Record, Runs, State, Status, StepSummary, Summary, Why, unix_ms,
};
use crate::pipeline::{Instance, Plan};
use crate::step::{Event, Step};
use crate::store::Spares;

/// Runs a plan.
///
/// # Errors
/// When the plan cannot be resolved ([`Unresolved`](super::Unresolved) in the chain) or the store
/// cannot be written ([`StoreError`](crate::store::StoreError) in the chain). A failed step is not
/// an error here: see [`Outcome::status`].
pub fn run(
    plan: &Plan,
    session: &Session<'_>,
    observe: &mut dyn FnMut(&RunEvent),
) -> Result<Outcome> {
    let (started, clock) = (Instant::now(), SystemTime::now());
    let mut prepared = prepare(plan, session, false)?;
    prepared.lock.save(&session.store)?;
    let info = session.run_info(&plan.name, &plan.file, unix_ms())?;
    let journal = Runs::of(&session.store).begin(info)?;
    scratch::sweep(&session.store);
    // What it is takes a reading of the whole program: only where it will be started.
    let isolated = prepared.steps.values().any(|step| step.isolate());
    let program = session.options.worker.as_ref().filter(|_| isolated);
    let program = program.map(|command| Program::of(command, &session.store)).transpose()?;
    let steps = std::mem::take(&mut prepared.steps);
    let rooms = Rooms::new(&session.store, &journal.info.id);
    let spares = Spares::default();
    let mut runner = Runner {
        plan,
        rooms: &rooms,
        spares: &spares,
        program: program.as_ref(),
        session,
        prepared: &prepared,
        steps,
        past: Past::of(&session.store, &plan.name),
        journal,
        observe,
        slots: Slots::new(&session.options),
        ready: Ready::new(plan, &prepared.order),
        records: BTreeMap::new(),
        by_key: BTreeMap::new(),
        ended: BTreeMap::new(),
        queue: BTreeMap::new(),
        running: BTreeMap::new(),
        stop: None,
        store_failed: false,
    };
    let result = runner.work();
    rooms.clear();
    if result.is_ok() && runner.status() == Status::Done {
        let run = (runner.journal.info.id.as_str(), clock);
        // Only an accelerator: what cannot be written is no failure.
        let _ = unchanged::remember(plan, session, &prepared, &runner.records, run);
    }
    runner.finish(result, started)
}

enum Message {
    Said(NodeIndex, Said),
    Ended(NodeIndex, Box<Ended>),
}

struct Runner<'a, 's> {
    plan: &'a Plan,
    rooms: &'a Rooms<'a>,
    spares: &'a Spares,
    program: Option<&'a Program<'a>>,
    session: &'a Session<'s>,
    prepared: &'a Prepared,
    /// Those that have not been decided yet.
    steps: BTreeMap<NodeIndex, Box<dyn Step>>,
    past: Past,
    journal: Journal,
    observe: &'a mut dyn FnMut(&RunEvent),
    slots: Slots,
    ready: Ready,
    /// Results so far.
    records: BTreeMap<NodeIndex, Record>,
    /// A step that has the result of a key.
    by_key: BTreeMap<Digest, NodeIndex>,
    /// What became of the steps that are through.
    ended: BTreeMap<NodeIndex, StepSummary>,
    /// By position in the plan, so that ties are always broken the same way.
    queue: BTreeMap<usize, (NodeIndex, Queued)>,
    running: BTreeMap<NodeIndex, Running>,
    /// Why nothing new is started.
    stop: Option<String>,
    store_failed: bool,
}

impl<'a> Runner<'a, '_> {
    fn instance(&self, node: NodeIndex) -> &'a Instance {
        &self.plan.graph[node]
    }

    fn id(&self, node: NodeIndex) -> String {
        self.instance(node).id.0.clone()
    }

    fn emit(&mut self, event: RunEvent) -> Result<()> {
        let passing = matches!(event, RunEvent::Step { event: Event::Progress { .. }, .. });
        if !passing {
            self.journal.event(&event)?;
        }
        (self.observe)(&event);
        Ok(())
    }

    fn work(&mut self) -> Result<()> {
        let steps = self.prepared.order.iter().map(|&n| self.id(n)).collect();
        self.emit(RunEvent::RunStarted {
            run: self.journal.info.id.clone(),
            pipeline: self.plan.name.clone(),
            steps,
            jobs: self.session.options.jobs,
        })?;
        std::thread::scope(|scope| {
            let (send, receive) = channel();
            let mut hands = Hands::new();
            let result = self.drive(scope, &mut hands, &send, &receive);
            if result.is_err() {
                // The scope waits for them.
                for running in self.running.values() {
                    running.cancel.store(true, Ordering::Relaxed);
                }
            }
            result
        })?;
        self.skip_the_rest()?;
        if self.status() == Status::Done {
            let run = &self.journal.info.id;
            for event in outputs::publish(self.plan, self.session, &self.records, run)? {
                self.emit(event)?;
            }
        }
        Ok(())
    }

    fn drive<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        hands: &mut Hands<'scope>,
        send: &Sender<Message>,
        receive: &Receiver<Message>,
    ) -> Result<()>
    where
        'a: 'scope,
    {
        loop {
            self.heed_clock_and_user();
            if self.stop.is_none() {
                self.decide_ready()?;
            }
            if self.stop.is_none() {
                self.start_queued(scope, hands, send)?;
            }
            if self.stop.is_none() && self.ready.any() {
                // A twin's result made others ready.
                continue;
            }
            if self.running.is_empty() && (self.stop.is_some() || self.queue.is_empty()) {
                return Ok(());
            }
            match receive.recv_timeout(Duration::from_millis(20)) {
                Ok(message) => self.take(message, hands)?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            while let Ok(message) = receive.try_recv() {
                self.take(message, hands)?;
            }
        }
    }

    fn heed_clock_and_user(&mut self) {
        let interrupted = self.session.cancel.load(Ordering::Relaxed);
        if interrupted && self.stop.is_none() {
            self.stop = Some("the run was stopped".into());
        }
        for running in self.running.values_mut() {
            let late = running.deadline.is_some_and(|d| Instant::now() >= d);
            running.timed_out |= late && !interrupted;
            if late || interrupted {
                running.cancel.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Decides every step whose producers are through, in plan order.
    fn decide_ready(&mut self) -> Result<()> {
        // What is looked up here may be swept away until the journal names it.
        let store = &self.session.store;
        let _shared = self.ready.any().then(|| store.lock_shared()).transpose()?;
        while let Some(position) = self.ready.next() {
            let node = self.prepared.order[position];
            // Only now is it needed.
            let Some(step) = self.steps.remove(&node) else { continue };
            match bind(self.plan, node, step.as_ref(), &self.records, &self.session.options) {
                Ok(bound) => self.decide(position, node, bound)?,
                Err(e) => self.fail(node, None, None, Failure::of(&e))?,
            }
            if self.stop.is_some() {
                break;
            }
        }
        Ok(())
    }

    fn decide(&mut self, position: usize, node: NodeIndex, bound: Bound) -> Result<()> {
        let forced = self.prepared.force.contains(&node);
        let (step, key) = (self.id(node), bound.key);
        let (store, instance) = (&self.session.store, self.instance(node));
        let why = match decide(store, &self.past, instance, &bound, forced)? {
            Decision::Hit(record) => return self.hit(node, *record),
            Decision::Miss(why) => why,
        };
        self.emit(RunEvent::Miss { step, key, why: why.clone() })?;
        let needs = self.session.options.needs(self.instance(node));
        let fits = self.session.options.allows(&needs).map_err(anyhow::Error::from);
        if let Err(e) = fits.and_then(|()| self.check_inputs(node, &bound)) {
            return self.fail(node, Some(key), Some(why), Failure::of(&e));
        }
        let queued = Queued { bound: Arc::new(bound), why, needs, attempt: 1, due: None };
        self.queue.insert(position, (node, queued));
        Ok(())
    }

    fn hit(&mut self, node: NodeIndex, record: Record) -> Result<()> {
        let (step, key) = (self.id(node), record.key);
        let (saved_seconds, warnings) = (record.made.seconds, record.warnings.clone());
        let made_by = format!("{}:{}", record.made.run, record.made.step);
        self.end(node, Some(key), State::Hit, 0.0, None, None);
        self.keep(node, record);
        self.emit(RunEvent::Hit { step, key, saved_seconds, made_by, warnings })
    }

    /// Remembers a step's result.
    fn keep(&mut self, node: NodeIndex, mut record: Record) {
        // Most of a record, and nobody asks for it again: the store has it.
        record.preimage = serde_json::Value::Null;
        let Made { run, step, seconds, cpu_seconds, peak_rss_bytes, .. } = record.made;
        record.made = Made { run, step, seconds, cpu_seconds, peak_rss_bytes, ..Made::default() };
        self.by_key.insert(record.key, node);
        self.records.insert(node, record);
        self.ready.produced(self.plan, node);
    }

    /// Lets a step look at its inputs' headers before anything is spent on it.
    fn check_inputs(&mut self, node: NodeIndex, bound: &Bound) -> Result<()> {
        let (instance, run) = (self.instance(node), &self.journal.info.id);
        let (checked, said) = check_inputs(self.session, run, instance, bound);
        for event in said {
            let step = self.id(node);
            self.emit(RunEvent::Step { step, event })?;
        }
        checked
    }

    fn start_queued<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        hands: &mut Hands<'scope>,
        send: &Sender<Message>,
    ) -> Result<()>
    where
        'a: 'scope,
    {
        let mut from = 0;
        while let Some((&position, (node, queued))) = self.queue.range(from..).next() {
            if self.slots.is_full() {
                break;
            }
            from = position + 1;
            let (node, key, needs) = (*node, queued.bound.key, queued.needs.clone());
            if queued.due.is_some_and(|due| Instant::now() < due) {
                continue;
            }
            // Two steps of one key: the second takes what the first made.
            if self.running.values().any(|r| r.queued.bound.key == key) {
                continue;
            }
            let twin = self.by_key.get(&key).and_then(|n| self.records.get(n)).cloned();
            if let (Some(twin), false) = (twin, self.prepared.force.contains(&node)) {
                self.queue.remove(&position);
                self.hit(node, twin)?;
                continue;
            }
            // What must be alone has nobody's result written beside it.
            if needs.exclusive && self.resting().next().is_some() {
                continue;
            }
            let Some(grant) = self.slots.take(&needs) else { continue };
            let Some((_, queued)) = self.queue.remove(&position) else { continue };
            self.start(node, queued, grant, scope, hands, send)?;
        }
        Ok(())
    }

    /// Steps whose work is done and whose results are being kept.
    fn resting(&self) -> impl Iterator<Item = &Running> {
        self.running.values().filter(|running| running.grant.is_none())
    }

    fn start<'scope>(
        &mut self,
        node: NodeIndex,
        queued: Queued,
        grant: Grant,
        scope: &'scope Scope<'scope, '_>,
        hands: &mut Hands<'scope>,
        send: &Sender<Message>,
    ) -> Result<()>
    where
        'a: 'scope,
    {
        let session: &'a Session<'_> = self.session;
        let (store, options) = (&session.store, &session.options);
        let instance = self.instance(node);
        let task = Task {
            run: self.journal.info.id.clone(),
            pipeline: self.plan.name.clone(),
            attempt: queued.attempt,
            force: self.prepared.force.contains(&node),
            ..Task::of(instance, &queued.bound, options, &grant)
        };
        let log_path = self.journal.log_path(&instance.id.0);
        let dir = scratch::path(store, &task.run, &task.key);
        let dirs = self.rooms.enter(&dir, queued.bound.step.as_ref())?;
        let cancel = Arc::new(AtomicBool::new(false));
        let bound = Arc::clone(&queued.bound);
        let (attempt_no, threads, gpus) = (queued.attempt, grant.threads, grant.gpus.clone());
        let running = Running {
            queued,
            grant: Some(grant),
            cancel: Arc::clone(&cancel),
            deadline: instance.policy.timeout.map(|t| Instant::now() + t),
            timed_out: false,
            started: Instant::now(),
            log: Log::at(log_path.clone()),
        };
        self.running.insert(node, running);
        let (program, rooms, spares) = (self.program, self.rooms, self.spares);
        let step = instance.id.0.clone();
        self.emit(RunEvent::Started { step, attempt: attempt_no, threads, gpus })?;
        let send = send.clone();
        hands.give(scope, move |hand| {
            let say = |said| {
                // Nobody listens only when the run has given up.
                let _ = send.send(Message::Said(node, said));
            };
            let worker = program.filter(|_| bound.step.isolate());
            let around = Around {
                store,
                hub: session.hub,
                cancel: &cancel,
                dirs: &dirs,
                spares,
                grace: options.grace,
                say: &say,
                secrets: task.secrets_in(options),
                alone: false,
                build: machine::BUILD,
            };
            let reply = match worker {
                Some(program) => {
                    attempt_in_worker(&task, &dir, &log_path, program, options, &around)
                }
                None => attempt(&task, bound.step.as_ref(), &dir, &around),
            };
            match &reply {
                Reply::Failed(failure) if failure.keep => scratch::keep(&dir),
                _ => rooms.leave(dir, &dirs),
            }
            let _ = send.send(Message::Ended(node, Box::new(Ended { reply, hand })));
        });
        Ok(())
    }

    fn take(&mut self, message: Message, hands: &mut Hands<'_>) -> Result<()> {
        match message {
            Message::Said(node, Said::Waiting(holder)) => {
                let step = self.id(node);
                self.emit(RunEvent::Waiting { step, holder })
            }
            Message::Said(node, Said::Resting) => {
                // As many as are at work, so that what waits for the disk does not grow.
                let resting = self.resting().count();
                if resting < self.session.options.jobs
                    && let Some(running) = self.running.get_mut(&node)
                    && let Some(grant) = running.grant.take()
                {
                    self.slots.give(grant);
                }
                Ok(())
            }
            Message::Said(node, Said::Event(event)) => {
                let line = match &event {
                    Event::Log { line } => Some(format!("{line}\n")),
                    Event::Warning { message } => Some(format!("warning: {message}\n")),
                    Event::Progress { .. } | Event::Metric { .. } => None,
                };
                if let (Some(line), Some(running)) = (line, self.running.get_mut(&node)) {
                    running.log.append(self.session.store.disk(), &line)?;
                }
                let step = self.id(node);
                self.emit(RunEvent::Step { step, event })
            }
            Message::Ended(node, ended) => {
                hands.rest(ended.hand);
                self.ended(node, ended.reply)
            }
        }
    }

    fn ended(&mut self, node: NodeIndex, reply: Reply) -> Result<()> {
        let Some(running) = self.running.remove(&node) else { return Ok(()) };
        let Running { queued, grant, timed_out, started, mut log, .. } = running;
        if let Some(grant) = grant {
            self.slots.give(grant);
        }
        let (step, key) = (self.id(node), queued.bound.key);
        let mut failure = match reply {
            Reply::Made { record, differs } => {
                let (seconds, facts) = (started.elapsed().as_secs_f64(), record.facts.clone());
                self.keep(node, *record);
                self.end(node, Some(key), State::Ran, seconds, Some(queued.why), None);
                let taken = false;
                return self.emit(RunEvent::Finished { step, key, seconds, facts, taken, differs });
            }
            Reply::Taken { record } => {
                let facts = record.facts.clone();
                self.keep(node, *record);
                self.end(node, Some(key), State::Hit, 0.0, Some(queued.why), None);
                let (seconds, taken, differs) = (0.0, true, Vec::new());
                return self.emit(RunEvent::Finished { step, key, seconds, facts, taken, differs });
            }
            Reply::Failed(failure) => failure,
        };
        if timed_out {
            let limit = self.instance(node).policy.timeout.unwrap_or_default();
            failure = Failure::plain(format!("it took longer than its timeout ({limit:?})"));
        } else if self.session.cancel.load(Ordering::Relaxed) {
            return self.skip(node, Some(key), "the run was stopped".into());
        }
        self.store_failed |= failure.store;
        let retry = self.instance(node).policy.retry;
        let again = queued.attempt <= retry.times;
        if again && !failure.store && !failure.keep && self.stop.is_none() {
            let (attempt, message) = (queued.attempt, failure.message);
            let pause = pause(retry, &key, attempt);
            let line = format!("attempt {attempt} failed: {message}\n");
            log.append(self.session.store.disk(), &line)?;
            let (of, in_seconds) = (retry.times + 1, pause.as_secs_f64());
            self.emit(RunEvent::Retrying { step, attempt, of, message, in_seconds })?;
            let due = Instant::now().checked_add(pause);
            let queued = Queued { attempt: attempt + 1, due, ..queued };
            self.queue.insert(self.ready.position(node), (node, queued));
            return Ok(());
        }
        self.fail(node, Some(key), Some(queued.why), failure)
    }

    fn end(
        &mut self,
        node: NodeIndex,
        key: Option<Digest>,
        state: State,
        seconds: f64,
        why: Option<Why>,
        message: Option<String>,
    ) {
        let id = self.id(node);
        self.ended.insert(node, StepSummary { id, key, state, seconds, why, message });
    }

    fn fail(
        &mut self,
        node: NodeIndex,
        key: Option<Digest>,
        why: Option<Why>,
        failure: Failure,
    ) -> Result<()> {
        let step = self.id(node);
        let message = failure.message.clone();
        self.end(node, key, State::Failed, 0.0, why, Some(message));
        let log_path = Some(self.journal.log_path(&step)).filter(|p| p.is_file());
        self.emit(RunEvent::Failed {
            step: step.clone(),
            message: failure.message,
            chain: failure.chain,
            help: failure.help,
            log_tail: log_path.as_deref().map(last_lines).unwrap_or_default(),
            log_path,
        })?;
        // What is downstream can never run now.
        let after = downstream(self.plan, node);
        for &next in &self.prepared.order {
            if after.contains(&next) && !self.ended.contains_key(&next) {
                self.skip(next, None, format!("{step} failed"))?;
            }
        }
        if (!self.session.options.keep_going || failure.store) && self.stop.is_none() {
            self.stop = Some(format!("the run stopped after {step} failed"));
        }
        Ok(())
    }

    fn skip(&mut self, node: NodeIndex, key: Option<Digest>, because: String) -> Result<()> {
        self.end(node, key, State::Skipped, 0.0, None, Some(because.clone()));
        let step = self.id(node);
        self.emit(RunEvent::Skipped { step, because })
    }

    fn skip_the_rest(&mut self) -> Result<()> {
        for &node in &self.prepared.order {
            if !self.ended.contains_key(&node) {
                let because = self.stop.clone().unwrap_or_else(|| "the run ended".into());
                self.skip(node, None, because)?;
            }
        }
        Ok(())
    }

    fn count(&self, state: State) -> usize {
        self.ended.values().filter(|s| s.state == state).count()
    }

    fn status(&self) -> Status {
        let all = self.count(State::Hit) + self.count(State::Ran) == self.prepared.order.len();
        match (all, self.session.cancel.load(Ordering::Relaxed)) {
            (true, _) => Status::Done,
            (false, true) => Status::Interrupted,
            (false, false) => Status::Failed,
        }
    }

    fn finish(mut self, result: Result<()>, started: Instant) -> Result<Outcome> {
        let status = if result.is_ok() { self.status() } else { Status::Failed };
        let seconds = started.elapsed().as_secs_f64();
        let (ran, hits) = (self.count(State::Ran), self.count(State::Hit));
        let (failed, skipped) = (self.count(State::Failed), self.count(State::Skipped));
        let run = self.journal.info.id.clone();
        let event =
            RunEvent::RunFinished { run: run.clone(), status, ran, hits, failed, skipped, seconds };
        let said = self.emit(event);
        let order = self.prepared.order.iter();
        let steps: Vec<StepSummary> = order.filter_map(|n| self.ended.remove(n)).collect();
        let states = steps.iter().map(|s| (s.id.clone(), s.state)).collect();
        let summary = Summary { status, seconds, ended_unix_ms: unix_ms(), steps };
        let written = self.journal.finish(&summary);
        // The first thing that went wrong is the one to report.
        result.and(said).and(written)?;
        let (steps, store_failed) = (states, self.store_failed);
        Ok(Outcome { run, status, steps, ran, hits, failed, skipped, seconds, store_failed })
    }
}
