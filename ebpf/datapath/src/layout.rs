//! Where the running kernel keeps the fields of `struct sk_buff` that the programs read past `__sk_buff`: by its own type
//! information (Documentation/bpf/btf.rst). Must never guess: a kernel that does not say it gets no programs.

use crate::DatapathError;
use btfparse::{Offset, Readable, TypeInformation};
use std::{fs, path::Path};
use tapgate_ebpf_common::maps::SkbLayout;

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
    read(Path::new(BTF)).ok_or_else(|| {
        DatapathError::Kernel(format!("type information of struct sk_buff in {BTF} (CONFIG_DEBUG_INFO_BTF)"))
    })
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
    let layout = SkbLayout {
        ip_summed: match member("ip_summed")? {
            Offset::BitOffsetAndSize(at, 2) => at,
            _ => return None,
        },
        csum_start: octets("csum_start")?,
        mac_header: octets("mac_header")?,
    };
    // Two bits of one octet; two halves side by side.
    let whole = layout.ip_summed % 8 <= 6 && octets("csum_offset")? == layout.csum_start + 2;
    whole.then_some(layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_says_it_and_nothing_else_is_believed() {
        let layout = skb().unwrap();
        assert!(layout.csum_start > 0 && layout.mac_header > 0 && layout.ip_summed > 0, "{layout:?}");
        let folder = tempfile::tempdir().unwrap();
        let whole = fs::read(BTF).unwrap();
        let file = folder.path().join("btf");
        for part in [0, 10, 1000, whole.len() / 2] {
            fs::write(&file, &whole[..part]).unwrap();
            assert_eq!(read(&file), None, "{part}");
        }
        assert_eq!(read(&folder.path().join("none")), None);
    }
}
