//! What names a process for good, where pids are reused and mean something only within one boot and one pid
//! namespace.

use std::fs;

/// Returns what makes pids unique: this boot and this pid namespace; empty where the system does not tell.
pub fn host() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let namespace = fs::read_link("/proc/self/ns/pid");
    match (boot, namespace) {
        (Ok(boot), Ok(namespace)) => format!("{} {}", boot.trim(), namespace.display()),
        _ => String::new(),
    }
}

/// Returns what names this machine, until it is started again; the same in its containers. Empty where the system does
/// not tell.
pub fn machine() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    boot.map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Returns what names this network: whoever has the same one reaches this process by a loopback address. A pod has one of
/// its own. Empty where the system does not tell.
pub fn network() -> String {
    match fs::read_link("/proc/self/ns/net") {
        Ok(namespace) => format!("{} {}", machine(), namespace.display()),
        Err(_) => machine(),
    }
}

/// Returns when a process started, in clock ticks since boot; absent if it does not run (a zombie
/// does not). Field 22 of `/proc/<pid>/stat`, proc(5).
pub fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}
