//! One linear layer with a low-rank adapter (Hu et al. 2021), trained on a regression.
//!
//! `cargo run --example lora_linear`
//!
//! The layer starts as the frozen one, because B is zero; only A and B learn; and the frozen
//! weight is the same to the last bit at the end.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use flow::learn::LoraLinear;
use flow::learn::random::Stream;

const ROWS: usize = 256;
const INPUTS: usize = 64;
const OUTPUTS: usize = 32;
const RANK: usize = 8;

fn normal(name: &str, shape: (usize, usize), scale: f64) -> Result<Tensor> {
    let stream = Stream::new(7, name);
    let n = (shape.0 * shape.1) as u64;
    let data: Vec<f32> = (0..n).map(|i| (scale * stream.normal(i)) as f32).collect();
    Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

#[expect(clippy::print_stdout, reason = "an example shows what it does")]
fn main() -> Result<()> {
    let weight = normal("weight", (OUTPUTS, INPUTS), 1.0 / (INPUTS as f64).sqrt())?;
    let before = bits(&weight)?;
    let layer = LoraLinear::new(&weight, None, RANK, 16.0, 42)?;

    // The target is another map, which differs from the frozen one by a matrix of rank 8.
    let x = normal("x", (ROWS, INPUTS), 1.0)?;
    let change =
        normal("left", (OUTPUTS, RANK), 0.1)?.matmul(&normal("right", (RANK, INPUTS), 1.0)?)?;
    let target = x.matmul(&(&weight + change)?.t()?)?;

    let start = layer.forward(&x)?.detach();
    ensure!(
        bits(&start)? == bits(&layer.forward_frozen(&x)?)?,
        "the fresh adapter changes the output"
    );
    println!("at the start it is the frozen layer, bit by bit");
    // candle's matmul sums in another order, so it agrees to rounding.
    let off = (&start - x.matmul(&weight.t()?)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    ensure!(off < 1e-5, "the frozen layer is not x W^T: {off}");

    let loss = |y: &Tensor| -> Result<Tensor> { Ok((y - &target)?.sqr()?.mean_all()?) };
    let first = loss(&start)?.to_scalar::<f32>()?;
    let mut moments: [Vec<(f64, f64)>; 2] = [Vec::new(), Vec::new()];
    for step in 1..=100 {
        let y = layer.forward(&x)?;
        let value = loss(&y)?;
        let grads = value.backward()?;
        for (var, moments) in [layer.a(), layer.b()].into_iter().zip(&mut moments) {
            let Some(grad) = grads.get(var) else {
                anyhow::bail!("the adapter got no gradient");
            };
            // Adam (Kingma and Ba 2014) with a rate of 0.02.
            let grad = grad.flatten_all()?.to_vec1::<f32>()?;
            let mut data = var.flatten_all()?.to_vec1::<f32>()?;
            moments.resize(data.len(), (0.0, 0.0));
            for ((p, g), (m, v)) in data.iter_mut().zip(grad).zip(moments.iter_mut()) {
                let g = f64::from(g);
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let (m, v) = (*m / (1.0 - 0.9f64.powi(step)), *v / (1.0 - 0.999f64.powi(step)));
                *p -= (0.02 * m / (v.sqrt() + 1e-8)) as f32;
            }
            var.set(&Tensor::from_vec(data, var.shape(), &Device::Cpu)?)?;
        }
        if step % 20 == 0 {
            println!("step {step:3}: loss {:.5}", value.to_scalar::<f32>()?);
        }
    }
    let last = loss(&layer.forward(&x)?)?.to_scalar::<f32>()?;
    println!("loss {first:.5} -> {last:.5}");
    ensure!(last < 0.05 * first, "the adapter did not learn: {first} -> {last}");
    ensure!(bits(&weight)? == before, "the frozen weight changed");
    println!("the frozen weight is unchanged, bit by bit");
    Ok(())
}
