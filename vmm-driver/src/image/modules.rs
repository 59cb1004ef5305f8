//! Which kernel modules the initramfs needs, and in what order they load: `modules.dep` read by its rules.

use std::collections::HashSet;

/// What a guest needs before its root disk is mounted and for reading its seed; the rest comes from the root disk.
pub const WANTED: &[&str] = &[
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "nls_cp437",
    "nls_ascii",
    "vfat",
    "virtio-rng",
    "virtio_console",
    "button",
    "evdev",
];

/// Paths (relative to the modules' folder) of the wanted modules and what they depend on, dependencies first. Modules
/// that the kernel has built in are not in `modules.dep` and are left out.
pub fn load_order(modules_dep: &str, wanted: &[&str]) -> Vec<String> {
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    for name in wanted {
        let Some(line) = modules_dep
            .lines()
            .find(|line| line.split_once(':').is_some_and(|(path, _)| module_name(path) == Some(name)))
        else {
            continue;
        };
        let Some((path, dependencies)) = line.split_once(':') else { continue };
        // depmod lists what is nearest first; loading goes the other way round.
        for path in dependencies.split_ascii_whitespace().rev().chain([path]) {
            if seen.insert(path.to_owned()) {
                order.push(path.to_owned());
            }
        }
    }
    order
}

fn module_name(path: &str) -> Option<&str> {
    path.rsplit('/').next()?.strip_suffix(".ko")
}

#[cfg(test)]
mod tests {
    use super::load_order;

    #[test]
    fn dependencies_load_first_and_once() {
        let dep = "kernel/virtio/virtio.ko: kernel/virtio/virtio_ring.ko\n\
                   kernel/virtio/virtio_ring.ko:\n\
                   kernel/block/virtio_blk.ko: kernel/virtio/virtio.ko kernel/virtio/virtio_ring.ko\n\
                   kernel/net/virtio_net.ko: kernel/net/net_failover.ko kernel/net/failover.ko kernel/virtio/virtio.ko kernel/virtio/virtio_ring.ko\n";
        let order = load_order(dep, &["virtio_blk", "virtio_net", "ext4"]);
        assert_eq!(
            order,
            [
                "kernel/virtio/virtio_ring.ko",
                "kernel/virtio/virtio.ko",
                "kernel/block/virtio_blk.ko",
                "kernel/net/failover.ko",
                "kernel/net/net_failover.ko",
                "kernel/net/virtio_net.ko",
            ]
        );
    }
}
