//! The datapath's own tests on kernels that this machine does not run: Debian 12's own, where programs attach by clsact,
//! and a newer one with TCX. The binaries that `cargo test` built here are run in a host in a box.
//!
//! The ordinary run takes the crafted frames and some of the attacks on the old kernel; with `TAPGATE_LONG` set,
//! everything runs on both.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};
use tapgate_e2e::{
    kvm_box::{Kernel, KvmBox},
    sh,
};

/// The datapath's test binaries, but for the one whose tables take more memory than the box has.
const BINARIES: [&str; 9] =
    ["matrix", "attacks", "namespaces", "lives", "told", "ipv6", "offload", "policy", "faults"];
/// What the ordinary run takes of them.
const SHORT: [(&str, &str); 7] = [
    ("matrix", "the_programs_judge_every_crafted_frame_as_the_table_does"),
    ("matrix", "only_answers_to_the_guests_own_flows_come_back"),
    ("attacks", "no_crafted_frame_of_a_closed_guest_arrives_anywhere"),
    ("namespaces", "guests_never_reach_each_other_nor_the_host_with_or_without_programs"),
    ("lives", "a_daemon_that_dies_changes_nothing_and_the_next_one_adopts"),
    ("policy", "no_frame_is_judged_by_half_a_change"),
    ("ipv6", "both_families_are_forwarded_refused_and_handed_over"),
];

/// The newest build of a test binary of the datapath's, from beside this one. Other packages have tests of the same name: what
/// a binary was made of stands in the file that cargo keeps beside it.
fn built(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let fits = |path: &PathBuf| {
        let file = path.file_name().unwrap().to_string_lossy();
        file.strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('-'))
            .is_some_and(|hash| !hash.contains('.'))
            && std::fs::read_to_string(path.with_extension("d"))
                .is_ok_and(|sources| sources.contains(&format!("ebpf/datapath/tests/{name}.rs")))
    };
    let all = std::fs::read_dir(own.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let newest = all.filter(fits).max_by_key(|path| path.metadata().unwrap().modified().unwrap());
    newest.unwrap_or_else(|| panic!("no `{name}`; first run: cargo build -p tapgate-datapath --tests"))
}

/// Without what debuggers read: it is most of the file.
fn stripped(name: &str, folder: &Path) -> PathBuf {
    let to = folder.join(name);
    sh::expect(Command::new("strip").arg("--strip-debug").arg("-o").arg(&to).arg(built(name)), b"").unwrap();
    to
}

fn run_on(kernel: Kernel) {
    let long = std::env::var_os("TAPGATE_LONG").is_some();
    let folder = std::env::temp_dir().join(format!("tapgate-kernels-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let binaries: Vec<PathBuf> = BINARIES.iter().map(|name| stripped(name, &folder)).collect();
    let share: Vec<(&Path, &str)> = binaries.iter().map(PathBuf::as_path).zip(BINARIES).collect();
    let host = KvmBox::boot(kernel, &share);
    std::fs::remove_dir_all(&folder).unwrap();
    let host = host.unwrap();
    assert!(host.expect("uname -r").unwrap().starts_with(kernel.release()));
    let runs: Vec<String> = if long {
        BINARIES.iter().map(|name| format!("/share/{name} --test-threads=1")).collect()
    } else {
        SHORT.iter().map(|(binary, test)| format!("/share/{binary} --exact {test}")).collect()
    };
    let mut failed = String::new();
    for run in runs {
        let done = host.sh(&run).unwrap();
        let count = done.out.lines().find(|line| line.starts_with("test result")).unwrap_or("no result");
        println!("{} {run}: {count}", kernel.release());
        // A name that is no test's any more runs nothing, and is no success.
        let ran = long || count.contains("1 passed");
        if !done.ok() || !ran {
            let text = done.out + &done.err;
            let from = text.char_indices().rev().nth(6000).map_or(0, |(at, _)| at);
            failed.push_str(&format!("\n{run}\n{}", &text[from..]));
        }
    }
    assert!(failed.is_empty(), "on kernel {}:{failed}", kernel.release());
}

#[test]
fn the_datapath_holds_on_kernel_6_1() {
    run_on(Kernel::V6_1);
}

#[test]
fn the_datapath_holds_on_kernel_6_12() {
    if std::env::var_os("TAPGATE_LONG").is_none() {
        eprintln!("skipped: set TAPGATE_LONG (cargo xtask test --long) for a host with kernel 6.12");
        return;
    }
    run_on(Kernel::V6_12);
}
