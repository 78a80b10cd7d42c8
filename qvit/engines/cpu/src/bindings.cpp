// The Python module `qvit.engines.cpu._native`: a model is handed over part by part, then an engine runs it.
#include "builder.h"
#include "engine.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

using namespace nb::literals;

namespace qvit::cpu {
namespace {

template <class T>
using Written = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

class PyEngine {
   public:
    PyEngine(Builder& builder, int threads, bool profile) {
        const Model& m = builder.model;
        check(m.ops && m.patch.kernel && (!m.embed.empty() || m.shape.windowed) && !m.pixel_table.empty(), "parts are missing");
        for (const Linear& output : m.outputs) {
            check(output.kernel, "a head is missing");
        }
        check(!m.stages.empty(), "parts are missing");
        for (const Stage& stage : m.stages) {
            check(&stage == &m.stages.front() || (stage.merge.kernel && !stage.merge_norm.gain.empty()), "patch merging is missing");
            for (const Block& b : stage.blocks) {
                check(b.qkv.kernel && b.proj.kernel && b.fc1.kernel && b.fc2.kernel && !b.norm1.gain.empty() &&
                          !b.norm2.gain.empty() && !b.heads[0].gain.empty() && !b.heads[1].gain.empty() &&
                          !b.heads[2].gain.empty() && b.attention.layout.heads && b.position_bias.empty() != m.shape.windowed,
                      "a part of a block is missing");
            }
        }
        engine_ = std::make_unique<Engine>(std::move(builder.model), threads, profile);
#ifdef __GLIBC__
        malloc_trim(0);  // what unpacking the weights took
#endif
    }

    // images: uint8 or float32 [B, C, H, W]; logits: float32 [B, classes], written. False: the images are not finite.
    bool run(const nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>& images, const Written<float>& logits,
             const std::optional<std::vector<Written<int16_t>>>& taps) {
        const Shape& s = engine_->model().shape;
        const bool bytes = images.dtype() == nb::dtype<uint8_t>();
        if (images.ndim() != 4 || (!bytes && images.dtype() != nb::dtype<float>()) || images.shape(0) > 1u << 20 ||
            images.shape(1) != static_cast<size_t>(s.channels) || images.shape(2) != static_cast<size_t>(s.height) ||
            images.shape(3) != static_cast<size_t>(s.width)) {
            throw std::invalid_argument("images are not uint8 or float32 [B, C, H, W] of the model's input size");
        }
        const size_t batch = images.shape(0);
        check(logits.size() == batch * static_cast<size_t>(s.classes), "the array of logits");
        Taps to;
        if (taps) {
            const Model& m = engine_->model();
            size_t number = 1 + m.outputs.size() + m.stages.size() - 1;
            for (const Stage& stage : m.stages) {
                number += 8 * stage.blocks.size();
            }
            check(taps->size() == number, "the number of taps");
            const size_t B = batch;
            size_t i = 0;
            const auto next = [&](size_t size) {
                check((*taps)[i].size() == size, "the size of a tap");
                return (*taps)[i++].data();
            };
            to.patch = next(B * static_cast<size_t>(m.stages[0].shape.tokens() - s.prefix) * static_cast<size_t>(s.patch_features()));
            for (const Stage& stage : m.stages) {
                const size_t N = B * static_cast<size_t>(stage.shape.tokens()), C = static_cast<size_t>(stage.shape.dim);
                to.merges.push_back(to.merges.empty() ? nullptr : next(N * static_cast<size_t>(stage.merge.K)));
                to.stages.emplace_back();
                for (size_t block = 0; block < stage.blocks.size(); block++) {
                    Taps::OfBlock t{};
                    t.qkv = next(N * C);
                    t.q = next(N * C);
                    t.k = next(N * C);
                    t.v = next(N * C);
                    t.map = next(N * static_cast<size_t>(stage.shape.heads) * static_cast<size_t>(stage.shape.window()));
                    t.proj = next(N * C);
                    t.fc1 = next(N * C);
                    t.fc2 = next(N * static_cast<size_t>(stage.shape.hidden));
                    to.stages.back().push_back(t);
                }
            }
            for (size_t k = 0; k < m.outputs.size(); k++) {
                to.outputs.push_back(next(B * static_cast<size_t>(m.stages.back().shape.dim)));
            }
        }
        const auto* data = images.data();
        float* out = logits.data();
        const nb::gil_scoped_release release;
        if (!bytes) {
            const float* x = static_cast<const float*>(data);
            const size_t count = images.size();
            bool finite = true;
            for (size_t i = 0; i < count; i++) {
                finite &= x[i] - x[i] == 0.0f;
            }
            if (!finite) {
                return false;
            }
        }
        engine_->run(bytes ? static_cast<const uint8_t*>(data) : nullptr, bytes ? nullptr : static_cast<const float*>(data),
                     static_cast<int>(batch), out, taps ? &to : nullptr);
        return true;
    }

    std::map<std::string, double> profile() {
        const Profile times = engine_->take_profile();
        std::map<std::string, double> out;
        for (int i = 0; i < kPhases; i++) {
            out[kPhaseNames[i]] = times[static_cast<size_t>(i)];
        }
        return out;
    }

    std::string isa() const { return name_of(engine_->model().isa); }
    int threads() const { return engine_->threads(); }
    std::map<std::string, std::string> kernels() const {
        const Model& m = engine_->model();
        std::map<std::string, std::string> names{{"patch_embed", m.patch.kernel->name}, {"head", m.outputs[0].kernel->name}};
        const Block& first = m.stages[0].blocks[0];
        names["qkv"] = first.qkv.kernel->name;
        names["proj"] = first.proj.kernel->name;
        names["fc1"] = first.fc1.kernel->name;
        names["fc2"] = first.fc2.kernel->name;
        return names;
    }

   private:
    std::unique_ptr<Engine> engine_;
};

}  // namespace
}  // namespace qvit::cpu

NB_MODULE(_native, m) {
    using namespace qvit::cpu;
    m.doc() = "The compiled part of qvit's CPU engine; use qvit.load(..., engine='cpu').";
    nb::set_leak_warnings(false);
    m.attr("sources") = QVIT_SOURCES;  // see digest.py
    m.def("isa_names", [] { return isa_names(); }, "The instruction sets that run here, best first.");
    m.def("choose_isa", [](const std::string& name) { return std::string(name_of(choose_isa(name))); }, "name"_a);
    m.def(
        "to_half",
        [](const std::string& isa, const Written<float>& x) {
            const size_t size = x.size();
            check(size <= 1u << 30, "an array");
            Floats padded(x.data(), size);
            ops_of(choose_isa(isa)).to_half(padded.data(), 0, 1, static_cast<int>(size));
            std::copy_n(padded.data(), size, x.data());
        },
        "isa"_a, "x"_a, "Rounds an array to float16, in place, as an instruction set rounds the residual stream.");
    nb::class_<Builder>(m, "Builder")
        .def(nb::init<const std::string&, const Sizes&, const std::vector<Sizes>&>(), "isa"_a, "shape"_a, "stages"_a)
        .def("set_linear", &Builder::set_linear, "which"_a, "index"_a, "bits"_a, "packed"_a, "scale"_a, "value_scale"_a,
             "half_step"_a, "bias"_a.none(), "x_bits"_a, "x_low"_a, "x_high"_a, "x_scale"_a, "x_offset"_a.none(),
             "x_row_scale"_a.none())
        .def("set_norm", &Builder::set_norm, "which"_a, "index"_a, "weight"_a, "bias"_a, "eps"_a, "gain"_a.none(), "shift"_a.none(),
             "margin"_a)
        .def("set_layer_scale", &Builder::set_layer_scale, "index"_a, "which"_a, "gamma"_a)
        .def("set_heads", &Builder::set_heads, "index"_a, "which"_a, "rectify"_a, "eps"_a, "low"_a, "high"_a, "half_row"_a,
             "stored_bias"_a, "margin"_a, "constants"_a, "row_scale"_a.none())
        .def("set_windows", &Builder::set_windows, "index"_a, "down"_a, "right"_a, "table"_a)
        .def("set_gelu", &Builder::set_gelu, "index"_a, "margin"_a)
        .def("set_attention", &Builder::set_attention, "index"_a, "numbers"_a, "factor"_a, "margin"_a, "q_scale"_a, "k_scale"_a,
             "q_offset"_a.none(), "p_scale"_a, "v_scale"_a, "v_offset"_a.none())
        .def("set_pixels", &Builder::set_pixels, "std"_a, "offset"_a, "scale"_a, "table"_a)
        .def("set_embed", &Builder::set_embed, "embed"_a);
    nb::class_<PyEngine>(m, "Engine")
        .def(nb::init<Builder&, int, bool>(), "model"_a, "threads"_a, "profile"_a)
        .def("run", &PyEngine::run, "images"_a, "logits"_a, "taps"_a.none() = nb::none())
        .def("profile", &PyEngine::profile)
        .def_prop_ro("isa", &PyEngine::isa)
        .def_prop_ro("threads", &PyEngine::threads)
        .def_prop_ro("kernels", &PyEngine::kernels);
}
