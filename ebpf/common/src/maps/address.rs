//! Addresses as keys and values hold them: octets in the order of the wire, whatever they are copied and compared by.

/// An IPv4 address as the maps hold it.
#[inline(always)]
pub const fn mapped(a: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3]]
}

/// An address in words, octets in the order of the wire: copied, compared and hashed a word at a time.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// The address of these octets.
    #[inline(always)]
    pub const fn new(a: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
            u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
            u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
            u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
        ])
    }

    /// The form of [`mapped`] of an IPv4 address that is a word already.
    #[inline(always)]
    pub const fn of_v4(word: u32) -> Self {
        Self([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), word])
    }

    /// Its octets.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        let ([a, b, c, d], [e, f, g, h]) = (self.0[0].to_ne_bytes(), self.0[1].to_ne_bytes());
        let ([i, j, k, l], [m, n, o, p]) = (self.0[2].to_ne_bytes(), self.0[3].to_ne_bytes());
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }
}

/// A MAC address in halves, octets in the order of the wire.
#[inline(always)]
pub const fn halves(m: [u8; 6]) -> [u16; 3] {
    [u16::from_ne_bytes([m[0], m[1]]), u16::from_ne_bytes([m[2], m[3]]), u16::from_ne_bytes([m[4], m[5]])]
}
