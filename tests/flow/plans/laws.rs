//! Laws: what must not matter to a key does not, and what must does.
