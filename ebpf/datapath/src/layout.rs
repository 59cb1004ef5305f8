//! Where the running kernel keeps the fields of `struct sk_buff` that the programs read past `__sk_buff`: by its own type
//! information (Documentation/bpf/btf.rst); and the programs' object, fitted to it. Must never guess: a kernel that does not
//! say it gets no programs.

use crate::DatapathError;
use btfparse::{Offset, Readable, TypeInformation};
use std::{fs, path::Path};
use tapgate_ebpf_common::maps::{CAST_CALL, SkbLayout};

/// Where a kernel with CONFIG_DEBUG_INFO_BTF shows its types.
pub(crate) const BTF: &str = "/sys/kernel/btf/vmlinux";

struct Bytes(Vec<u8>);

impl Readable for Bytes {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> btfparse::Result<()> {
        let part = usize::try_from(offset).ok().and_then(|from| self.0.get(from..)?.get(..buffer.len()));
        let end =
            || btfparse::Error::new(btfparse::ErrorKind::InvalidOffset, "the type information ends here");
        buffer.copy_from_slice(part.ok_or_else(end)?);
        Ok(())
    }
}

/// The layout in the running kernel.
pub(crate) fn skb() -> Result<SkbLayout, DatapathError> {
    let layout = read(Path::new(BTF));
    give_back();
    layout.ok_or_else(|| {
        DatapathError::Kernel(format!("type information of struct sk_buff in {BTF} (CONFIG_DEBUG_INFO_BTF)"))
    })
}

/// All types of a kernel take some 50 MiB in small pieces, which the C library would keep for as long as the daemon runs.
fn give_back() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "malloc_trim has no safe form")]
    // SAFETY: it only gives back what nobody has (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The object with the number of the kernel's function in each call of it. With number 0 the calls are none, which the kernel
/// takes where they cannot be reached.
pub(crate) fn fitted(object: &[u8], layout: &SkbLayout) -> Result<Vec<u8>, DatapathError> {
    let call = CAST_CALL.to_le_bytes();
    let mut object = object.to_vec();
    let mut calls = 0;
    // The sections of programs are aligned to eight, the size of an instruction.
    for instruction in object.as_chunks_mut::<8>().0 {
        if *instruction == call {
            instruction[4..].copy_from_slice(&layout.cast.to_le_bytes());
            calls += 1;
        }
    }
    match calls {
        0 => Err(DatapathError::Config(
            "the embedded BPF object has no place for the kernel's function; build it anew".into(),
        )),
        _ => Ok(object),
    }
}

fn read(path: &Path) -> Option<SkbLayout> {
    let bytes = Bytes(fs::read(path).ok()?);
    let types = TypeInformation::new(&bytes).ok()?;
    let skb = types.id_of("sk_buff")?;
    let member = |name| types.offset_of(skb, name).ok().map(|(_, offset)| offset);
    let octets = |name| match member(name)? {
        Offset::ByteOffset(at) => Some(at),
        Offset::BitOffsetAndSize(..) => None,
    };
    let Offset::BitOffsetAndSize(ip_summed, 2) = member("ip_summed")? else { return None };
    let layout = SkbLayout {
        ip_summed: ip_summed / 8,
        partial: 0b11 << (ip_summed % 8),
        csum_start: octets("csum_start")?,
        mac_header: octets("mac_header")?,
        cast: types.id_of("bpf_cast_to_kern_ctx").unwrap_or_default(),
    };
    // Two bits of one octet; two halves side by side.
    let whole = ip_summed % 8 <= 6 && octets("csum_offset")? == layout.csum_start + 2;
    whole.then_some(layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_says_it_and_nothing_else_is_believed() {
        let layout = skb().unwrap();
        assert!(layout.csum_start > 0 && layout.mac_header > 0 && layout.ip_summed > 0, "{layout:?}");
        assert_eq!(layout.partial.count_ones(), 2, "{layout:?}");
        let folder = tempfile::tempdir().unwrap();
        let whole = fs::read(BTF).unwrap();
        let file = folder.path().join("btf");
        for part in [0, 10, 1000, whole.len() / 2] {
            fs::write(&file, &whole[..part]).unwrap();
            assert_eq!(read(&file), None, "{part}");
        }
        assert_eq!(read(&folder.path().join("none")), None);
    }

    #[test]
    fn each_call_gets_the_number_and_an_object_without_one_is_refused() {
        let layout = SkbLayout { cast: 0x0102_0304, ..SkbLayout::default() };
        let call = CAST_CALL.to_le_bytes();
        let other = [9; 8];
        let object = [other, call, other, call].concat();
        let number = [0x85, 0x20, 0, 0, 4, 3, 2, 1];
        assert_eq!(fitted(&object, &layout).unwrap(), [other, number, other, number].concat());
        assert!(matches!(fitted(&other, &layout), Err(DatapathError::Config(_))));
    }
}
