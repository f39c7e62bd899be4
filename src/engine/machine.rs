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

/// Host name.
pub(super) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
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
        assert!(super::cpu_seconds().is_some_and(|s| (0.0..3600.0).contains(&s)));
    }
}
