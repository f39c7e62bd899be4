//! What goes into a record about the machine. Nothing here is ever part of a key.

use std::path::{Path, PathBuf};

use crate::step::Device;

/// Version of this program.
pub(super) const BUILD: &str = env!("CARGO_PKG_VERSION");

/// The file of the program that runs now: on Linux the very file, even if another has taken its
/// path since.
pub(super) fn program() -> std::io::Result<PathBuf> {
    let own = Path::new("/proc/self/exe");
    if own.exists() { Ok(own.to_path_buf()) } else { std::env::current_exe() }
}

/// As in records.
pub(super) fn device_name(device: Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda => "cuda",
    }
}

/// Instruction set: architecture and the widest vector extension.
pub(super) fn isa() -> String {
    let arch = rustix::system::uname().machine().to_string_lossy().into_owned();
    #[cfg(target_arch = "x86_64")]
    {
        let widest = if std::arch::is_x86_feature_detected!("avx512f") {
            "avx512f"
        } else if std::arch::is_x86_feature_detected!("avx2") {
            "avx2"
        } else {
            "sse2"
        };
        format!("{arch}+{widest}")
    }
    #[cfg(not(target_arch = "x86_64"))]
    arch
}

/// Largest resident memory of this process in bytes, where the system says.
pub(super) fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Bytes of memory of this machine, or of the control group that this process is held to where
/// that is less; absent where the system does not say (not Linux).
pub fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().flat_map(limits_of);
    Some(limits.fold(kib * 1024, u64::min))
}

/// The limits of a line of `/proc/self/cgroup` (`number:controllers:path`): those of the group and
/// of all that it is in. A group without a limit says `max`, or has none of these files.
fn limits_of(line: &str) -> Vec<u64> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { return Vec::new() };
    let (root, file) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max"),
        list if list.split(',').any(|c| c == "memory") => {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        }
        _ => return Vec::new(),
    };
    let group = Path::new(root).join(path.trim_start_matches('/'));
    let around = group.ancestors().take_while(|dir| dir.starts_with(root));
    let read = |dir: &Path| std::fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok();
    around.filter_map(read).collect()
}

/// CPU seconds of this process and of the children it waited for, where the system says.
pub(super) fn cpu_seconds() -> Option<f64> {
    // In ticks of 1/100 s, which is what Linux shows to programs on every architecture that
    // matters here (USER_HZ).
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name may hold anything but ends at the last parenthesis.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: f64 = fields.get(11..15)?.iter().filter_map(|f| f.parse::<f64>().ok()).sum();
    Some(ticks / TICKS_PER_SECOND)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #[test]
    fn the_system_says() {
        assert!(super::peak_rss_bytes().is_some_and(|b| b > 1 << 20));
        assert!(super::memory_bytes().is_some_and(|b| b > 64 << 20));
        assert!(super::limits_of("0::/").len() <= 1);
        assert!(super::limits_of("4:cpu,cpuacct:/x").is_empty() && super::limits_of("").is_empty());
        assert!(super::cpu_seconds().is_some_and(|s| (0.0..3600.0).contains(&s)));
    }
}
