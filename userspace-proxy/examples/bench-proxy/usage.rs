//! What a process and its children use, as the kernel counts it.

use std::{collections::HashMap, fs};

/// Processor time and memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Seconds, user and system.
    pub cpu: f64,
    /// Proportional set size in KiB.
    pub kib: f64,
}

impl Usage {
    /// Of a process and all that descend from it.
    pub fn of(pid: u32) -> Self {
        let mut parents = HashMap::new();
        let mut times = HashMap::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            // After the name, which may hold anything: state, parent, …; user and system time are fields 14 and 15.
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
            let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
            parents.insert(pid, u32::try_from(number(1)).unwrap_or(0));
            times.insert(pid, number(11) + number(12));
        }
        let mut usage = Self::default();
        for of in parents.keys() {
            let mut at = *of;
            while at != pid && at > 1 {
                at = parents.get(&at).copied().unwrap_or(0);
            }
            if at == pid {
                usage.cpu += times.get(of).copied().unwrap_or(0) as f64 / TICKS;
                usage.kib += pss(*of);
            }
        }
        usage
    }
}

/// `USER_HZ` on every architecture that we run on.
const TICKS: f64 = 100.0;

fn pss(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
}
