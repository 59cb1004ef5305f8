//! What one connection may hold that nobody has read yet, out of what its VM may: a few connections get as much as bulk
//! wants, the next ones less, and all the others as little as the protocol lets be. Chosen when the connection begins, by
//! what the VM holds at that moment; given back when the connection is gone.

use crate::place::{Place, Places};

/// Connections of a VM with the widest window, of each side.
const WIDE: usize = 16;
/// Connections with the middle one.
const MIDDLE: usize = 112;

/// The windows of one VM's connections, on one side of the proxy.
#[derive(Default)]
pub(crate) struct Windows {
    wide: Places,
    middle: Places,
}

/// A connection's window; its share goes back on drop.
pub(crate) struct Window {
    pub(crate) size: Size,
    _place: Option<Place>,
}

/// How wide a window is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(u32);

impl Windows {
    /// The widest that is left.
    pub(crate) fn take(&self) -> Window {
        if let place @ Some(_) = self.wide.take(WIDE) {
            return Window { size: Size(2 * 1024 * 1024), _place: place };
        }
        if let place @ Some(_) = self.middle.take(MIDDLE) {
            return Window { size: Size(256 * 1024), _place: place };
        }
        // What a connection has before anything is said (RFC 9113 §6.9.2); it cannot be taken back.
        Window { size: Size(65_535), _place: None }
    }
}

impl Size {
    /// For all streams of an HTTP/2 connection together. Fixed: one that grew with what the path carries would let every
    /// connection hold many times as much.
    pub(crate) fn of_connection(self) -> u32 {
        self.0
    }

    /// For each of its streams: one that is not read leaves room for another.
    pub(crate) fn of_stream(self) -> u32 {
        self.0 / 2
    }

    /// What HTTP/1 reads at once, a head in one piece among it; never less than this.
    pub(crate) fn of_buffer(self, least: usize) -> usize {
        usize::try_from(self.0).unwrap_or(least).clamp(least, 256 * 1024)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_are_wide_the_rest_narrow_and_a_place_given_back_is_taken_again() {
        let windows = Windows::default();
        let mut all: Vec<Window> = (0..164).map(|_| windows.take()).collect();
        let octets: Vec<u32> = all.iter().map(|window| window.size.of_connection()).collect();
        assert_eq!(octets[..16], [2 << 20; 16]);
        assert_eq!(octets[16..128], [256 << 10; 112]);
        assert_eq!(octets[128..], [65_535; 36]);
        assert_eq!((all[0].size.of_stream(), all[163].size.of_stream()), (1 << 20, 32_767));
        assert_eq!(all[0].size.of_buffer(1 << 16), 256 << 10);
        assert_eq!(all[163].size.of_buffer(1 << 16), 1 << 16);
        drop(all.remove(3));
        let next = [windows.take(), windows.take()].map(|window| window.size);
        assert_eq!(next, [Size(2 << 20), Size(65_535)]);
    }
}
