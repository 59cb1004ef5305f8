//! `bench-proxy`: spliced and opened TLS through tapgate's proxy, beside other proxies and none at all, in one run on one
//! machine. Prints Markdown. Everything runs in namespaces of its own and ends with it.

mod load;
mod ours;
mod peers;
mod stage;
mod usage;

use anyhow::{Context as _, Result};
use load::{Outcome, Target};
use stage::{BULK, ORIGIN, OURS, PEERS, PLAIN, Running, SECRET, Stage};
use std::{
    fmt::Write as _, net::SocketAddr, os::unix::process::CommandExt as _, process::Command, time::Duration,
};
use usage::Usage;

/// One proxy, or none.
struct Subject {
    name: String,
    opens: bool,
    target: Target,
    /// Its process, whose children count too.
    pid: Option<u32>,
    /// How much it stands: mitmproxy would take minutes for what others do in a second.
    idle: usize,
}

/// What was measured of one.
#[derive(Default)]
struct Figures {
    bulk: Outcome,
    /// Processor seconds of the proxy for each 10⁹ octets.
    cpu: f64,
    opening: Outcome,
    kept: Outcome,
    /// KiB for each idle connection, and in all.
    memory: (f64, f64),
    failed: Vec<String>,
}

/// What can be asked for alone, in the order in which it is measured.
const MEASURES: [&str; 4] = ["bulk", "new", "kept", "idle"];

/// The two ways of treating TLS.
const WAYS: [&str; 2] = ["spliced", "opened"];

#[derive(Clone, Copy)]
struct Plan {
    each: Duration,
    rounds: usize,
    idle: usize,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [word, dir] = args.as_slice()
        && word == "serve"
    {
        return ours::serve(dir.as_ref());
    }
    enclosed(&args)?;
    let plan = match args.iter().any(|arg| arg == "--long") {
        true => Plan { each: Duration::from_secs(3), rounds: 3, idle: 10_000 },
        false => Plan { each: Duration::from_secs(2), rounds: 3, idle: 2_000 },
    };
    let rounds = args.iter().find_map(|arg| arg.strip_prefix("--rounds=")?.parse().ok());
    let plan = Plan { rounds: rounds.unwrap_or(plan.rounds), ..plan };
    // Peers, measures and ways by name; without any, all.
    let (measures, only): (Vec<&String>, Vec<&String>) =
        args.iter().filter(|arg| !arg.starts_with("--")).partition(|arg| MEASURES.contains(&arg.as_str()));
    let (ways, only): (Vec<&String>, Vec<&String>) =
        only.into_iter().partition(|arg| WAYS.contains(&arg.as_str()));
    let wanted = MEASURES.map(|name| measures.is_empty() || measures.iter().any(|measure| *measure == name));
    let most = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, descriptors) = nix::sys::resource::getrlimit(most)?;
    nix::sys::resource::setrlimit(most, descriptors, descriptors)?;
    // A spliced connection takes two of the proxy's.
    let plan = Plan { idle: plan.idle.min(usize::try_from(descriptors)?.saturating_sub(2200) / 2), ..plan };
    let stage = Stage::new()?;
    let (running, mut subjects) = subjects(&stage, &only, plan)?;
    subjects.retain(|s| {
        s.pid.is_none() || ways.is_empty() || ways.iter().any(|way| *way == WAYS[usize::from(s.opens)])
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .on_thread_start(stage.enter_guest())
        .build()
        .context("a runtime for the load")?;
    let mut all: Vec<(Subject, Vec<Figures>)> = subjects.into_iter().map(|s| (s, Vec::new())).collect();
    for round in 0..plan.rounds {
        for (subject, figures) in &mut all {
            eprintln!("round {} of {}: {}", round + 1, plan.rounds, subject.name);
            let [.., idle] = wanted;
            figures.push(measure(&runtime, subject, plan, wanted, idle && round == 0));
        }
    }
    if std::env::var_os("BENCH_KEEP_LOGS").is_some() {
        stage::sh(&format!(
            "mkdir -p /tmp/bench-proxy-logs; cp -r {}/*.log {0}/*.out {0}/*.conf {0}/squid*/cache.log /tmp/bench-proxy-logs/ || true",
            stage.dir().display()
        ))?;
    }
    drop(running);
    let rows: Vec<(Subject, Figures)> = all.into_iter().map(|(s, figures)| (s, median(figures))).collect();
    print!("{}", report(&rows, plan)?);
    Ok(())
}

/// Goes on in a process namespace of its own, so that whatever ends this ends all that it started: Squid changes its user, and
/// with it loses the signal that the others get.
fn enclosed(args: &[String]) -> Result<()> {
    const INSIDE: &str = "BENCH_PROXY_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return Ok(());
    }
    let error = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe()?)
        .args(args)
        .env(INSIDE, "1")
        .exec();
    Err(error).context("unshare, of util-linux, could not be started")
}

fn subjects(stage: &Stage, only: &[&String], plan: Plan) -> Result<(Vec<Running>, Vec<Subject>)> {
    use peers::port;
    let wanted = |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part.as_str()));
    let (mut running, mut subjects) = (Vec::new(), Vec::new());
    let tls = &stage.tls;
    let target = |from, at: (std::net::Ipv4Addr, u16), connect| Target {
        from,
        to: SocketAddr::from(at),
        connect,
        tls: tls.clone(),
    };
    let origin = target(PLAIN, (ORIGIN, 443), false);
    subjects.push(Subject {
        name: "no proxy".into(),
        opens: false,
        target: origin,
        pid: None,
        idle: plan.idle,
    });
    let own = std::env::current_exe()?;
    let ours = stage::start(&own, &["serve", &stage.dir().to_string_lossy()], &stage.file("ours.log"))?;
    stage.answers((std::net::Ipv4Addr::LOCALHOST, tapgate_ebpf_common::net::port::TCP))?;
    for (opens, from) in [(false, PLAIN), (true, SECRET)] {
        let to = target(from, (OURS, 443), false);
        subjects.push(Subject {
            name: "tapgate".into(),
            opens,
            target: to,
            pid: Some(ours.0.id()),
            idle: plan.idle,
        });
    }
    running.push(ours);
    let version = |program: &str, args: &[&str]| format!("{program} {}", peers::version(program, args));
    let (haproxy, nginx, squid) =
        (version("haproxy", &["-v"]), version("nginx", &["-v"]), version("squid", &["-v"]));
    let mut add = |name: String, opens, port, connect, idle, started: Result<Running>| {
        let started = started.with_context(|| name.clone())?;
        let target = target(PLAIN, (PEERS, port), connect);
        subjects.push(Subject { name, opens, target, pid: Some(started.0.id()), idle });
        running.push(started);
        anyhow::Ok(())
    };
    if wanted("haproxy") {
        add(haproxy, false, port::HAPROXY, false, plan.idle, peers::haproxy(stage))?;
    }
    if wanted("nginx") {
        add(nginx.clone(), false, port::NGINX_SPLICE, false, plan.idle, peers::nginx_splice(stage))?;
        add(nginx, true, port::NGINX_OPEN, false, plan.idle, peers::nginx_open(stage))?;
    }
    if wanted("squid") {
        add(squid.clone(), false, port::SQUID_SPLICE, true, plan.idle, peers::squid(stage, false))?;
        add(squid, true, port::SQUID_OPEN, true, plan.idle, peers::squid(stage, true))?;
    }
    if wanted("mitmproxy") {
        let name = format!("mitmproxy {}", peers::mitmproxy_version());
        add(name, true, port::MITMPROXY, true, plan.idle / 20, peers::mitmproxy(stage))?;
    }
    // Spliced ones first.
    subjects.sort_by_key(|subject| subject.opens);
    Ok((running, subjects))
}

fn measure(
    runtime: &tokio::runtime::Runtime,
    subject: &Subject,
    plan: Plan,
    wanted: [bool; 4],
    memory: bool,
) -> Figures {
    let mut figures = Figures::default();
    let usage = || subject.pid.map(Usage::of).unwrap_or_default();
    let mut take = |what: &str, outcome: Result<Outcome>| {
        outcome.unwrap_or_else(|error| {
            figures.failed.push(format!("{what}: {error:#}"));
            Outcome::default()
        })
    };
    let mut run = |what: usize| match wanted[what] {
        false => Outcome::default(),
        true => take(
            MEASURES[what],
            runtime.block_on(async { tokio::spawn(spawned(subject.target.clone(), plan.each, what)).await? }),
        ),
    };
    let before = usage();
    let bulk = run(0);
    let cpu = usage().cpu - before.cpu;
    let opening = run(1);
    let before = usage();
    let kept = run(2);
    let each = (usage().cpu - before.cpu) * 1e6 / kept.count.max(1) as f64;
    if memory {
        let before = usage();
        let target = subject.target.clone();
        let idle = subject.idle;
        match runtime.block_on(async { tokio::spawn(async move { load::idle(&target, idle).await }).await? })
        {
            Ok(open) => {
                std::thread::sleep(Duration::from_millis(500));
                let after = usage();
                figures.memory = ((after.kib - before.kib) / open.len() as f64, after.kib);
            }
            Err(error) => figures.failed.push(format!("idle: {error:#}")),
        }
    }
    figures.cpu = if bulk.count > 0 { cpu / (bulk.count as f64 / 1e9) } else { 0.0 };
    (figures.bulk, figures.opening, figures.kept) = (bulk, opening, kept);
    eprintln!(
        "  {:.0} MB/s, {:.2} CPU s/GB, {:.0} new/s, {:.0} requests/s ({each:.1} CPU us), p50 {:?}, p99 {:?}, {:.1} KiB/idle",
        figures.bulk.rate / 1e6,
        figures.cpu,
        figures.opening.rate,
        figures.kept.rate,
        figures.kept.p50,
        figures.kept.p99,
        figures.memory.0
    );
    for failed in &figures.failed {
        eprintln!("{}: {failed}", subject.name);
    }
    figures
}

/// On a thread of the load, which is in the guest's namespace.
async fn spawned(target: Target, each: Duration, what: usize) -> Result<Outcome> {
    match what {
        0 => load::bulk(&target, each).await,
        1 => load::opening(&target, each).await,
        _ => load::keep_alive(&target, each).await,
    }
}

/// The round in the middle, for each figure.
fn median(mut rounds: Vec<Figures>) -> Figures {
    let middle = rounds.len() / 2;
    let mut figures = Figures::default();
    let by =
        |rounds: &mut Vec<Figures>, of: fn(&Figures) -> f64| rounds.sort_by(|a, b| of(a).total_cmp(&of(b)));
    figures.memory = rounds.iter().map(|f| f.memory).fold((0.0, 0.0), |a, b| if b.1 > a.1 { b } else { a });
    figures.failed = rounds.iter_mut().flat_map(|f| std::mem::take(&mut f.failed)).collect();
    by(&mut rounds, |f| f.bulk.rate);
    figures.bulk = rounds[middle].bulk.clone();
    by(&mut rounds, |f| f.cpu);
    figures.cpu = rounds[middle].cpu;
    by(&mut rounds, |f| f.opening.rate);
    figures.opening = rounds[middle].opening.clone();
    by(&mut rounds, |f| f.kept.rate);
    figures.kept = rounds[middle].kept.clone();
    figures
}

fn report(rows: &[(Subject, Figures)], plan: Plan) -> Result<String> {
    let mut text = String::new();
    writeln!(
        text,
        "A guest's namespace, a veth pair, and one with the proxies and an nginx as the origin. The load (rustls, no resumption), the proxy and the \
         origin share the processors. Bulk: {} connections fetch {} MiB again and again. New connections: 24 workers, a full handshake and a GET of 1 KiB on \
         each. Keep-alive: 32 connections, GET of 1 KiB. Each figure is the median of {} rounds of {} s. CPU is the proxy's own (user and system), for each 10⁹ octets. \
         Memory is what {} idle connections add to the proportional set size (mitmproxy: a twentieth as many). Squid and mitmproxy are asked by CONNECT. \
         Opened by tapgate: a secret is put into every request, every answer is searched for it.\n",
        load::BULK_CONNECTIONS,
        BULK >> 20,
        plan.rounds,
        plan.each.as_secs(),
        plan.idle
    )?;
    for opens in [false, true] {
        writeln!(text, "## {}\n", if opens { "Opened TLS" } else { "Spliced TLS" })?;
        writeln!(
            text,
            "| | MB/s | CPU s/GB | new conn/s | requests/s | p50 | p99 | KiB/idle conn | MiB in all |"
        )?;
        writeln!(text, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")?;
        for (subject, f) in rows.iter().filter(|(s, _)| s.opens == opens || opens && s.pid.is_none()) {
            let ms = |d: Duration| format!("{:.2} ms", d.as_secs_f64() * 1e3);
            let own = |text: String| if subject.pid.is_some() { text } else { "".into() };
            writeln!(
                text,
                "| {} | {:.0} | {} | {:.0} | {:.0} | {} | {} | {} | {} |",
                subject.name,
                f.bulk.rate / 1e6,
                own(format!("{:.2}", f.cpu)),
                f.opening.rate,
                f.kept.rate,
                ms(f.kept.p50),
                ms(f.kept.p99),
                own(format!("{:.1}", f.memory.0)),
                own(format!("{:.0}", f.memory.1 / 1024.0))
            )?;
        }
        writeln!(text)?;
    }
    bars(&mut text, rows)?;
    let failed: Vec<_> =
        rows.iter().flat_map(|(s, f)| f.failed.iter().map(move |w| format!("- {}: {w}", s.name))).collect();
    if !failed.is_empty() {
        writeln!(text, "## What failed\n\n{}", failed.join("\n"))?;
    }
    Ok(text)
}

fn bars(text: &mut String, rows: &[(Subject, Figures)]) -> Result<()> {
    let find =
        |name: &str, opens: bool| rows.iter().find(|(s, _)| s.name.starts_with(name) && s.opens == opens);
    writeln!(
        text,
        "## Bars\n\n| tapgate against | bar | bulk | new connections | keep-alive |\n| --- | ---: | ---: | ---: | ---: |"
    )?;
    let all = [
        (false, "haproxy", "HAProxy, splicing", 1.0),
        (false, "nginx", "nginx `ssl_preread`", 1.0),
        (false, "no proxy", "no proxy", 0.9),
        (true, "nginx", "nginx terminating", 1.0),
        (true, "squid", "Squid `bump`", 5.0),
        (true, "mitmproxy", "mitmproxy", 50.0),
    ];
    for (opens, name, label, bar) in all {
        let (Some((_, ours)), Some((_, theirs))) = (find("tapgate", opens), find(name, opens)) else {
            continue;
        };
        let cell = |ours: f64, theirs: f64| {
            let ratio = ours / theirs.max(f64::MIN_POSITIVE);
            let missed = if ratio < bar {
                format!(" (missed by {:.0}%)", (1.0 - ratio / bar) * 100.0)
            } else {
                String::new()
            };
            format!("{ratio:.2}{missed}")
        };
        writeln!(
            text,
            "| {label} | {bar} | {} | {} | {} |",
            cell(ours.bulk.rate, theirs.bulk.rate),
            cell(ours.opening.rate, theirs.opening.rate),
            cell(ours.kept.rate, theirs.kept.rate)
        )?;
    }
    writeln!(text)?;
    Ok(())
}
