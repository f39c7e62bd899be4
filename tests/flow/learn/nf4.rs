//! The bytes of bitsandbytes.

use candle_core::{DType, Device, Tensor};
use flow::learn::nf4::Nf4;
use safetensors::SafeTensors;

use super::fixture;

#[test]
fn bytes_and_values_are_those_of_bitsandbytes() {
    let path = fixture("nf4/bitsandbytes.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let original = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let mut checked = 0;
    for matrix in ["a", "b", "zeros"] {
        for (kind, double) in [("single", false), ("double", true)] {
            let weight = &original[&format!("{matrix}.original")];
            let packed = Nf4::quantize(weight, double).unwrap();
            let mut names = Vec::new();
            for (end, dtype, shape, data) in packed.tensors() {
                let name = format!("{matrix}.{kind}.{end}");
                let expected = tensors.tensor(&name).unwrap();
                assert_eq!((dtype, &shape[..]), (expected.dtype(), expected.shape()), "{name}");
                let text = String::from_utf8_lossy(&data[..data.len().min(300)]);
                assert!(data == expected.data(), "{name} differs: {text}");
                names.push(name);
            }
            let prefix = format!("{matrix}.{kind}.weight");
            let mut there = tensors.names();
            there.retain(|n| n.starts_with(&prefix));
            assert_eq!(there.len(), names.len());
            let expected = &original[&format!("{matrix}.{kind}.dequantized")];
            let found = Tensor::from_vec(packed.dequantize(), weight.dims(), &Device::Cpu).unwrap();
            let expected = expected.to_dtype(DType::F32).unwrap();
            assert_eq!(super::numbers(&found), super::numbers(&expected), "{matrix} {kind}");
            checked += 1;
        }
    }
    assert_eq!(checked, 6);
}
